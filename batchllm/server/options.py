"""What of the batch API can be set.

Knows limits and the storage's place; not what uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    """Limits of the batch API, and where it keeps what it has."""

    storage: Path
    """Folder of files, batches and their results; made if need be. One server at a time uses it."""
    max_file_bytes: int = 1 << 30
    """Largest file that may be uploaded."""
    upload_idle_s: float = 60.0
    """Seconds for which an upload may stand still; then it is cut off."""
    max_open_uploads: int = 256
    """Uploads that are received at once; more are refused with a hint to try again."""
    storage_limit: int | None = None
    """Bytes that stored files may have together; an upload beyond is refused, results of batches are not. None: what
    the disk holds."""
    max_rows: int = 1_000_000
    """Most rows of a batch."""
    max_active_jobs: int = 32
    """Batches that run at once; the others wait, in order of creation."""
    max_token_bytes: int = 2 << 30
    """Token ids that all batches in progress hold in memory together. Those of a batch that does not fit in one half of
    it, beside the others, are on disk, and it is planned in shards, which have the other half. A plan
    has a copy of what is left of them."""
    grace_s: float = 30.0
    """Time that running rows of a batch may take to finish, after it was cancelled or has expired."""
