"""The objects of OpenAI's API for files and batches, as they are sent and received.

Knows their fields and limits; not where they are kept.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, StringConstraints, field_validator

BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
ACTIVE_STATUSES: tuple[BatchStatus, ...] = ("validating", "in_progress", "finalizing", "cancelling")
"""Of batches that have not ended."""
INPUT_PURPOSE = "batch"
OUTPUT_PURPOSE = "batch_output"
WINDOW_PATTERN = r"^[1-9][0-9]{0,5}[smhd]$"
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 2_592_000


class FileObject(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    status_details: None = None


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class BatchDeleted(BaseModel):
    """A batch that is gone."""

    id: str
    object: Literal["batch"] = "batch"
    deleted: bool = True


class BatchErrorObject(BaseModel):
    """What is wrong with a batch or one of its lines."""

    code: str
    line: int | None = None
    message: str
    param: str | None = None


class BatchErrors(BaseModel):
    """Why a batch has failed."""

    object: Literal["list"] = "list"
    data: list[BatchErrorObject]


class RequestCounts(BaseModel):
    """Rows of a batch."""

    total: int
    completed: int
    failed: int


class InputTokensDetails(BaseModel):
    """How many prompt tokens were not computed."""

    cached_tokens: int


class OutputTokensDetails(BaseModel):
    """How many generated tokens were reasoning; not counted, so 0."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens of all answered rows."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class BatchObject(BaseModel):
    """A batch."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    usage: BatchUsage | None
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """A page of batches."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ErrorBody(BaseModel):
    """What was wrong with a request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The answer to a request that cannot be served."""

    error: ErrorBody


class OutputExpiry(BaseModel):
    """When the files of results go."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: Annotated[StrictInt, Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)]

    @field_validator("seconds", mode="before")
    @classmethod
    def _take_whole(cls, seconds: object) -> object:
        """In JSON 3600.0 is a whole number too."""
        return int(seconds) if isinstance(seconds, float) and seconds.is_integer() else seconds


class BatchCreate(BaseModel):
    """A request for a new batch."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: Annotated[StrictStr, Field(max_length=64)]
    endpoint: Literal[
        "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/score", "/v1/rerank", "/v1/embeddings"
    ]
    completion_window: Annotated[StrictStr, StringConstraints(pattern=WINDOW_PATTERN)]
    metadata: (
        Annotated[
            dict[Annotated[StrictStr, Field(max_length=64)], Annotated[StrictStr, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    output_expires_after: OutputExpiry | None = None


def seconds_of(window: str) -> int:
    """Length of a completion window such as ``24h``."""
    assert re.match(WINDOW_PATTERN, window), window
    return int(window[:-1]) * _SECONDS[window[-1]]
