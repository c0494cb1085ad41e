"""Who has signed in: a browser sends no key by itself, so that it gets a token for one.

Knows the key and the clock; not cookies or HTTP.

INVARIANT: a token says nothing of the key, and is good until it expires, on servers with the same key only.
"""

from __future__ import annotations

import hmac
import secrets

from batchllm.server.steady_clock import unix_now

LIFETIME_S = 12 * 3600


class Sessions:
    """Tokens of those who know the key.

    Args:
        key: The server's.
    """

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._signing_key = hmac.digest(self._key, b"batchllm: sessions of the page", "sha256")

    def is_key(self, given: str) -> bool:
        """Whether it is the key; takes as long either way."""
        return hmac.compare_digest(given.encode(errors="replace"), self._key)

    def new_token(self) -> str:
        """A token for `LIFETIME_S` seconds."""
        claim = f"{int(unix_now()) + LIFETIME_S}.{secrets.token_hex(16)}"
        return f"{claim}.{self._signature(claim)}"

    def is_good(self, token: str | None) -> bool:
        """Whether it was made by `new_token`, and has not expired."""
        claim, _, signature = (token or "").rpartition(".")
        if not hmac.compare_digest(signature.encode(errors="replace"), self._signature(claim).encode()):
            return False
        return int(claim.partition(".")[0]) > unix_now()

    def _signature(self, claim: str) -> str:
        return hmac.digest(self._signing_key, claim.encode(errors="replace"), "sha256").hex()
