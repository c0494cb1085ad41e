"""Odd and damaged inputs for ``check_fuzz.py``: rows of every kind, in every format, changed at random.

Knows formats of inputs and what a plain look says of them; not how batchllm reads them.

INVARIANT: what a file is depends on the random numbers alone; what is claimed of it was counted in its bytes.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

_BOM = b"\xef\xbb\xbf"
_ENCODINGS = (
    *((mark, "utf-32") for mark in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),  # before those that begin them
    *((mark, "utf-16") for mark in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    *((b"{\0", "utf-16-le"), (b"\0{", "utf-16-be"), (b"[\0", "utf-16-le"), (b"\0[", "utf-16-be")),
)
"""How text begins that is not UTF-8."""
_MAGICS = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1")
_CHAT = {"method": "POST", "url": "/v1/chat/completions"}
_TEXT = {"method": "POST", "url": "/v1/completions"}
_WORDS = ("red", "green", "blue", "çà", "日本", "🙂", "a\nb", 'q"q', "{x}", "")


class Raw(str):
    """JSON text that is written as it is, whether it is JSON or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A file, and what is sure about it.

    Attributes:
        path: The file or directory.
        format: jsonl, jsonl.gz, jsonl.zst, parquet, arrow, hf.
        kind: What was done to it.
        row_lines: Line numbers of its rows; None where they cannot be known.
        must_run: It can be read and has rows, so that nothing but rows may fail.
    """

    path: Path
    format: str
    kind: str
    row_lines: list[int] | None
    must_run: bool


def make(folder: Path, rng: random.Random) -> Made:
    """Makes one in a folder."""
    form = rng.choice(["jsonl"] * 12 + ["jsonl.gz"] * 2 + ["jsonl.zst"] * 2 + ["parquet"] * 2 + ["arrow", "hf"])
    if form.startswith("jsonl"):
        kind = rng.choice([*_TEXT_CHANGES, *["json"] * 8, "bytes", "cut", "lines"])
        plain = _TEXT_CHANGES[kind](_lines(rng), rng)
        return _make_jsonl(folder, form, kind, plain, rng)
    table = _table(rng)
    data = _parquet(table, rng) if form == "parquet" else _arrow(table)
    kind = rng.choice(["none", "bytes", "bytes", "bytes", "cut"])
    changed = data if kind == "none" else _change_bytes(data, rng) if kind == "bytes" else _cut(data, rng)
    path = folder / f"in.{form}"
    if form == "hf":
        path.mkdir()
        state = json.dumps({"_data_files": [{"filename": "data-0.arrow"}], "_format_type": None}).encode()
        if kind == "bytes" and rng.random() < 0.3:
            state, changed = _change_bytes(state, rng), data
        (path / "state.json").write_bytes(state)
        path = path / "data-0.arrow"
    path.write_bytes(changed)
    rows = list(range(1, len(table) + 1))
    return Made(path=path.parent if form == "hf" else path, format=form, kind=kind, row_lines=rows, must_run=False)


def _make_jsonl(folder: Path, form: str, kind: str, plain: bytes, rng: random.Random) -> Made:
    is_damaged = form != "jsonl" and rng.random() < 0.5
    data = plain
    if form == "jsonl.gz":
        data = gzip.compress(plain)
    elif form == "jsonl.zst":
        data = zstandard.ZstdCompressor().compress(plain)
    if is_damaged:
        kind, data = "damaged " + form[6:], rng.choice([_change_bytes, _cut])(data, rng)
    path = folder / f"in.{form}"
    path.write_bytes(data)
    if is_damaged or (form == "jsonl" and data.startswith(_MAGICS)):
        return Made(path=path, format=form, kind=kind, row_lines=None, must_run=False)
    encoding = next((name for begin, name in _ENCODINGS if plain.startswith(begin)), "utf-8")
    try:
        text = plain if encoding == "utf-8" else plain.decode(encoding).encode()
    except UnicodeDecodeError:
        return Made(path=path, format=form, kind=kind, row_lines=None, must_run=False)
    lines = text.removeprefix(_BOM).split(b"\n")
    rows = [number for number, line in enumerate(lines, start=1) if line.strip()]
    return Made(path=path, format=form, kind=kind, row_lines=rows, must_run=bool(rows))


# Rows


def _row(number: int, rng: random.Random) -> dict[str, Any]:
    text = " ".join(rng.choices(_WORDS, k=rng.randrange(6))) + "."
    sampling = {"temperature": 0, "max_new_tokens": rng.randint(1, 9), "n": rng.choice([1, 1, 3])}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    metadata = {"task": "t", "expected_new_tokens": "3"}
    return rng.choice(
        [
            {"id": f"r{number}", "input_ids": [1, 2, rng.randrange(1000)], "sampling_params": sampling},
            {"id": number, "input_ids": [5], "namespace": "n", "task": "t", "expected_new_tokens": 2},
            {"id": f"r{number}", "prompt": text, "sampling_params": sampling},
            {"prompt": text},
            {"id": f"r{number}", "messages": messages},
            {"custom_id": f"r{number}", **_CHAT, "body": {"model": "m", "messages": messages, "max_tokens": 4}},
            {"custom_id": f"r{number}", **_CHAT, "body": {"model": "m", "messages": messages, "metadata": metadata}},
            {"custom_id": f"r{number}", **_TEXT, "body": {"model": "m", "prompt": text, "logprobs": 1, "stop": ["x"]}},
            {"custom_id": f"r{number}", **_TEXT, "body": {"model": "m", "prompt": [3, 4], "seed": 7}},
        ]
    )


def _lines(rng: random.Random) -> list[bytes]:
    return [json.dumps(_row(i, rng), ensure_ascii=rng.random() < 0.5).encode() for i in range(rng.randint(1, 12))]


# Changes of JSON

_DEEP = 5000
_ODD_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda rng: rng.choice([None, True, False, 0, -1, 1.5, "", "x", [], {}, [[]], [None], {"": {}}, [1, "a"], "1"]),
    lambda rng: rng.choice([2**31, 2**31 - 1, -(2**31), 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**40]),
    lambda rng: rng.choice([1e308, -1e308, 1e-320, 0.1, -0.0, 1e15, 1e16]),
    lambda rng: Raw(rng.choice(["NaN", "Infinity", "-Infinity", "1e999", "1E400", "01", "1.", "+1", "0x10", "nul"])),
    lambda rng: Raw(rng.choice(["9" * 5000, '"' + "9" * 5000 + '"', "-" + "9" * 400, "0." + "3" * 3000])),
    lambda rng: rng.choice(["9" * 5000, "-1", "0", "1.5", "٣", "²", "1_000", " 7 ", "1e3", "0" * 5000]),
    lambda rng: Raw("[" * rng.choice([3, 100, 1000, _DEEP]) + rng.choice(["", "1"])),
    lambda rng: _nested(rng.choice([3, 100, 900, 1023, 1024, 1025, _DEEP]), rng),
    lambda rng: Raw(rng.choice([r'"\ud800"', r'"a\udc00b"', r'"\ud83d\ude42"', r'"\u0000"', r'"\x41"', r'"\uD83D"'])),
    lambda rng: rng.choice(["\0", "\x1b[31mred", "\u2028", "\ufeff", "\u202e", "\x7f", "\r", "\t", "a\0b", "\ufffe"]),
    lambda rng: "x" * rng.choice([255, 4096, 70_000]),
    lambda rng: [rng.choice([0, 4095, 4096, -1, 2**31, 1.0, True, "1", None, 999])] * rng.choice([1, 2, 2048, 5000]),
    lambda rng: {rng.choice(["role", "content", "type", "text", "n", "stop", "regex"]): rng.choice([1, "(", [], {}])},
    lambda rng: [
        {"role": rng.choice(["user", "tool", "", 5]), "content": rng.choice(["x", None, [], [{"type": "x"}]])}
    ],
    lambda rng: rng.choice(["POST", "GET", "/v1/embeddings", "/v1/completions", "system"]),
    lambda rng: {"type": "json_schema", "json_schema": {"schema": rng.choice([{}, 5, "{", {"type": []}])}},
)
_KEYS = (
    *("id", "custom_id", "prompt", "input_ids", "messages", "sampling_params", "namespace", "task", "body", "url"),
    *("expected_new_tokens", "max_new_tokens", "min_new_tokens", "n", "seed", "stop", "stop_token_ids", "regex"),
    *("json_schema", "response_format", "top_logprobs", "logprobs", "stream", "tools", "metadata", "temperature"),
    *("top_p", "top_k", "min_p", "logit_bias", "ignore_eos", "max_tokens", "max_completion_tokens", "", "\0", "zzz"),
)


def _nested(depth: int, rng: random.Random) -> Raw:
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    return Raw(opening * depth + "1" + closing * depth)


def _change_json(lines: list[bytes], rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(lines))
        record = _row(at, rng)
        for _ in range(rng.randint(1, 3)):
            _change_value(record, rng)
        lines[at] = _dump(record).encode(errors="surrogatepass")
    return _join(lines, rng)


def _change_value(value: Any, rng: random.Random) -> None:
    """Changes something in a list or an object, at any depth."""
    value = rng.choice(list(_containers(value)))
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    made = rng.choice(_ODD_VALUES)(rng)
    if isinstance(value, dict) and (not keys or rng.random() < 0.3):
        value[rng.choice(_KEYS)] = made
    elif keys and rng.random() < 0.1:
        del value[rng.choice(keys)]
    elif keys:
        value[rng.choice(keys)] = made


def _containers(value: Any) -> Iterator[Any]:
    """All lists and objects in a value, itself included."""
    if isinstance(value, (dict, list)):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def _dump(value: Any) -> str:
    """JSON, but for what is `Raw`."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dump(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value)


# Changes of bytes


def _join(lines: list[bytes], rng: random.Random) -> bytes:
    end = rng.choice([b"\n", b"\n", b"\n", b"\r\n"])
    return end.join(lines) + rng.choice([end, b""])


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(len(changed) + 1)
        change = rng.randrange(5)
        if change == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif change == 1 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif change == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        elif change == 3:
            del changed[at : at + rng.randint(1, 16)]
        else:
            start = rng.randrange(len(changed) + 1)
            changed[at:at] = changed[start : start + rng.randint(1, 64)]
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _shuffle_lines(lines: list[bytes], rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 10)):
        at = rng.randrange(len(lines) + 1)
        lines[at:at] = [rng.choice([*lines, b"", b" ", b"\t", b"{}", b"[]", b"null", b'"x"', b"{}{}", b"\0"])]
    return _join(lines, rng)


def _encode(lines: list[bytes], rng: random.Random) -> bytes:
    text = _join(lines, rng).decode()
    encoding = rng.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-7", "utf-8-sig"])
    return rng.choice([b"", b"", _BOM, _BOM * 2]) + text.encode(encoding, errors="replace")


def _empty(lines: list[bytes], rng: random.Random) -> bytes:
    return rng.choice([b"", b"\n", b" ", b"\r\n" * 50, b"\t \n" * 1000, _BOM, _BOM + b"\n", b"\x0c\n\x0b"])


def _huge_line(lines: list[bytes], rng: random.Random) -> bytes:
    size = rng.choice([1, 2, 5]) << 20
    huge = rng.choice(
        [
            lambda: b"x" * size,
            lambda: b"[" * size,
            lambda: json.dumps({"id": "big", "input_ids": [7] * (size // 8)}).encode(),
            lambda: json.dumps({"id": "x" * size, "input_ids": [7]}).encode(),
            lambda: json.dumps({"input_ids": [7], "x" * size: 1}).encode(),
            lambda: bytes(size),
        ]
    )()
    lines.insert(rng.randrange(len(lines) + 1), huge)
    return _join(lines, rng)


def _blank_lines(lines: list[bytes], rng: random.Random) -> bytes:
    for _ in range(3):
        at = rng.randrange(len(lines) + 1)
        lines[at:at] = [rng.choice([b"", b"   ", b"\r"])] * rng.choice([10, 1000, 30_000])
    return _join(lines, rng)


_TEXT_CHANGES: dict[str, Callable[[list[bytes], random.Random], bytes]] = {
    "none": _join,
    "json": _change_json,
    "bytes": lambda lines, rng: _change_bytes(_join(lines, rng), rng),
    "cut": lambda lines, rng: _cut(_join(lines, rng), rng),
    "lines": _shuffle_lines,
    "encoding": _encode,
    "empty": _empty,
    "huge line": _huge_line,
    "blank lines": _blank_lines,
}

# Tables


def _table(rng: random.Random) -> pa.Table:
    num_rows = rng.randint(1, 40)
    columns: dict[str, Any] = {
        "prompt": [rng.choice([*_WORDS, None]) for _ in range(num_rows)],
        "id": rng.choice([[f"r{i}" for i in range(num_rows)], list(range(num_rows)), [1.5] * num_rows]),
        "input_ids": [rng.choice([None, [1, 2], []]) for _ in range(num_rows)],
        "sampling_params": [{"n": 1, "temperature": 0.5, "stop": ["x"]}] * num_rows,
        "messages": [[{"role": "user", "content": "x"}]] * num_rows,
        "when": pa.array(range(num_rows), pa.timestamp("us")),
        "body": [b"\xff\0"] * num_rows,
    }
    kept = rng.sample(list(columns), rng.randint(1, len(columns)))
    return pa.table({name: columns[name] for name in kept})


def _parquet(table: pa.Table, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    compression = rng.choice(["snappy", "zstd", "gzip", "none"])
    pq.write_table(table, buffer, row_group_size=rng.randint(1, 40), compression=compression)
    return buffer.getvalue()


def _arrow(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table, max_chunksize=10)
    return buffer.getvalue()
