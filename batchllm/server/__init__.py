"""The server room: OpenAI's API for files and batches, on disk, and the threads that run batches.

A batch is the same durable job as ``batchllm run``'s: journal, runner and recorder of ``offline``. Knows HTTP and the
storage; not sglang, and not the application that its routes are put in.

INVARIANT: a row of a batch is in its output file or its error file, once, however often the server ends on the way.
"""

from batchllm.server.metrics import BatchMetrics
from batchllm.server.options import BatchOptions
from batchllm.server.page import LiveNumbers
from batchllm.server.service import BatchService

__all__ = ["BatchMetrics", "BatchOptions", "BatchService", "LiveNumbers"]
