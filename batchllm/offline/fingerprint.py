"""What a job is, in a few named texts: two runs may share a journal only if all of them are the same.

Knows names and texts, and how to tell one model folder from another; not journals' files and not what the texts mean.

INVARIANT: equal parts in equal order have an equal digest, wherever and whenever they are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import orjson
import xxhash

from batchllm.errors import ConfigError

_CONTENT_PATTERNS = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.py", "vocab.txt", "merges.txt")
"""Configuration, tokenizer, chat template, and code that comes with a model: small, so what is in them counts."""
_WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""Weights are too large to read for this; a change of them that keeps each size is not seen."""
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What results depend on.

    Attributes:
        parts: Text by name of the part, e.g. ``input``, ``model``, ``sampling``; their order counts.
    """

    parts: Mapping[str, str]

    @property
    def digest(self) -> str:
        """16 hex digits."""
        return blake2b(orjson.dumps(list(self.parts.items())), digest_size=8).hexdigest()

    def difference(self, other: Fingerprint) -> list[str]:
        """One clause for each part in which the other, later one differs; empty if none does."""
        return [
            f"{name} was {_shown(self.parts.get(name))}, is now {_shown(other.parts.get(name))}"
            for name in {**self.parts, **other.parts}
            if self.parts.get(name) != other.parts.get(name)
        ]


def check_same(folder: Path, recorded: Fingerprint, own: Fingerprint) -> None:
    """The journal in a folder is of this job.

    Raises:
        ConfigError: It is of another one; says in what they differ.
    """
    if recorded.digest == own.digest:
        return
    reasons = "; ".join(recorded.difference(own)) or "the same parts in another order"
    raise ConfigError(
        f"{folder}: this folder has the results of another job, {recorded.digest}, and this one is {own.digest}: "
        f"{reasons}. Give another folder, or --restart to delete those results and begin anew"
    )


def model_identity(model_path: str, revision: str | None = None) -> str:
    """A text that is the same for the same model.

    A local folder is identified by what is in it: contents of configuration, tokenizer and code, names and sizes of
    weights. Anything else is a name on a hub, with its revision.

    Raises:
        ConfigError: A file of a local model cannot be read.
    """
    path = Path(model_path)
    if not path.exists():
        return f"{model_path}@{revision}" if revision else model_path
    digest = xxhash.xxh3_128()
    try:
        for name, content in _identifying_contents(path):
            digest.update(b"%d %s %s" % (len(name), name, content))
    except OSError as error:
        raise ConfigError(f"--model {model_path}: {error.filename or path}: {error.strerror}") from error
    return f"local {digest.hexdigest()}"


def _identifying_contents(path: Path) -> list[tuple[bytes, bytes]]:
    """What tells a local model from others, each file by name with a digest of its content or its size."""
    if path.is_file():
        return [(path.name.encode(), b"%d" % path.stat().st_size)]
    contents = {file.name: _content_digest(file) for pattern in _CONTENT_PATTERNS for file in path.glob(pattern)}
    sizes = {file.name: b"%d" % file.stat().st_size for pattern in _WEIGHT_PATTERNS for file in path.glob(pattern)}
    return [(name.encode(), value) for name, value in sorted({**contents, **sizes}.items())]


def _content_digest(file: Path) -> bytes:
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.digest()


def _shown(text: str | None) -> str:
    return "not given" if text is None else repr(text)
