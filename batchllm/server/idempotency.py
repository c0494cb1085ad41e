"""Requests that may be sent again: an ``Idempotency-Key`` and what came of the request that had it first.

Knows keys and digests of requests; not what is requested. A key is kept as long as the object that it made.

INVARIANT: of all requests with one key, one makes an object.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, Any, Literal

import orjson
from fastapi import Header

from batchllm.server.api_errors import ApiError
from batchllm.server.database import Database

Kind = Literal["file", "batch"]
IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]
"""The parameter of a route that may be asked again."""


class IdempotencyKeys:
    """The keys of a storage."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, kind: Kind, key: str | None, digest: str) -> str | None:
        """The object that a request with this key has made; None where there is none, or no key.

        Raises:
            ApiError: 409: it was another request.
        """
        if key is None:
            return None
        found = self._database.query(
            "SELECT digest, object_id FROM idempotency WHERE kind = ? AND key = ?", (kind, key)
        )
        if not found:
            return None
        if found[0]["digest"] != digest:
            message = "this Idempotency-Key was used for another request; give each request a key of its own"
            raise ApiError(409, message, code="idempotency_key_reused", param="Idempotency-Key")
        return str(found[0]["object_id"])

    def add(self, kind: Kind, key: str | None, digest: str, object_id: str) -> None:
        """A request has made an object; to be called in the transaction that makes it."""
        if key is not None:
            self._database.write(
                "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?)", (kind, key, digest, object_id)
            )


def request_digest(*parts: Any) -> str:
    """Tells a request from others.

    Args:
        parts: JSON values.
    """
    return sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()
