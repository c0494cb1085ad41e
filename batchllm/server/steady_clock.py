"""Unix time that nobody sets while the server runs.

Deadlines are Unix seconds, because they must hold over a restart. A machine's clock that is set meanwhile, by hours,
would end batches that have all their time left, or keep files for ever. So the clock is read once, and what passes is
counted from there, sleep of the machine included; the next start reads it again.

INVARIANT: of two readings in one process the later one is not smaller.
"""

from __future__ import annotations

import time


def _since_boot() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


_BOOTED_AT = time.time() - _since_boot()


def unix_now() -> float:
    """Seconds since 1970, by the machine's clock as it was when the server started."""
    return _BOOTED_AT + _since_boot()
