"""What every process of an engine does first. (Upstream: ``srt/utils/common.py``.)"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

from sglang.srt.utils import kill_itself_when_parent_died
from tqdm import tqdm


def begin() -> None:
    """End with the parent, however it ends, and leave Ctrl-C to it.

    Upstream asks the kernel to be told of the parent's death, but says nothing of a parent that died before, while this
    process was importing: nobody would ever end it.

    Raises:
        SystemExit: The parent is gone.
    """
    # Ctrl-C in a terminal reaches every process of the job; the driver decides what still runs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A progress bar (of loading weights) would make a lock for several processes: a semaphore in shared memory, which
    # stays there if this process is killed.
    tqdm.set_lock(threading.RLock())
    kill_itself_when_parent_died()
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        raise SystemExit("the process that started this one has ended")
