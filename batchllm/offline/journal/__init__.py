"""The journal of a job: `database` opens its file and names its faults, `results` writes and reads the results in it,
`status` says from outside how far the job is.
"""

from batchllm.offline.journal.results import MAX_COMMIT_AGE_S, NUM_ROWS_PER_COMMIT, Journal
from batchllm.offline.journal.status import NUM_EXAMPLES, FailureKind, JobStatus, Speed, read_status

__all__ = [
    "MAX_COMMIT_AGE_S",
    "NUM_EXAMPLES",
    "NUM_ROWS_PER_COMMIT",
    "FailureKind",
    "JobStatus",
    "Journal",
    "Speed",
    "read_status",
]
