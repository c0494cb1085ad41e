"""What is needed of a row when its answer comes: its name, its format, its carried columns. On disk, not in memory.

Knows a file without a name; the kernel removes it with the process. What it holds is read again from the input when a
job is resumed.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from pathlib import Path

import msgspec

from batchllm.dataset.records import RowHead
from batchllm.errors import WorkloadError

_BLOCK = 1 << 20
_ENCODER, _DECODER = msgspec.json.Encoder(), msgspec.json.Decoder(RowHead)


class RowSpool:
    """Heads of rows, by row number.

    Args:
        folder: A folder with room for some dozen bytes a row.

    Raises:
        WorkloadError: No file can be made there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            # For the life of the spool, whose `close` closes it.
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._refused(error) from error
        self._offsets = array("q", [0])
        self._buffer = bytearray()
        self._num_flushed = 0

    def append(self, head: RowHead) -> None:
        """The head of the next row.

        Raises:
            WorkloadError: The disk refuses.
        """
        self._buffer += _ENCODER.encode(head)
        self._offsets.append(self._num_flushed + len(self._buffer))
        if len(self._buffer) >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Everything appended can be read from now on."""
        try:
            view = memoryview(self._buffer)
            while view:
                view = view[self._file.write(view) or 0 :]
        except OSError as error:
            raise self._refused(error) from error
        self._num_flushed += len(self._buffer)
        self._buffer = bytearray()

    def read(self, row: int) -> RowHead:
        """The head of a row that has been flushed."""
        start = self._offsets[row]
        data = os.pread(self._file.fileno(), self._offsets[row + 1] - start, start)
        return _DECODER.decode(data)

    def close(self) -> None:
        """Give the file back. Closing twice does nothing."""
        self._file.close()

    def _refused(self, error: OSError) -> WorkloadError:
        return WorkloadError(f"{self._folder}: {error.strerror}; make room there, and run it again")
