"""Frontend programs (`sglang.lang`) whose requests are planned together.

`BatchBackend` runs them on a `BatchEngine` in this process, `Endpoint` on a server. ``@sgl.function`` and all in it
stay as they are; importing this makes ``run`` and ``run_batch`` ask these two backends to run programs their own way,
and changes nothing for any other. This room knows how programs run and what they ask; it must not know how a wave
is computed.
"""

from batchllm.lang.backend import BatchBackend
from batchllm.lang.endpoint import Endpoint
from batchllm.lang.programs import install

__all__ = ["BatchBackend", "Endpoint"]

install()
