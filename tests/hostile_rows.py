"""Rows with values at and beyond every limit, in every field, from a seed."""

from __future__ import annotations

import json
import random
from typing import Any

_DEEP: Any = {"type": "object"}
for _ in range(120):
    _DEEP = {"type": "object", "properties": {"a": _DEEP}}

_SHARED: dict[str, list[Any]] = {
    "temperature": [0, 1e-30, 2.0, 1e300, -1, "1", None, True],
    "top_p": [1, 1e-300, 1e-6, 0, 1.0000001, -0.5, []],
    "top_k": [-1, 0, 1, 4096, 5000, 2**31 - 1, 2**31, 2**63, 2**64, 1.5],
    "min_p": [0, 1, 1e-300, 1.1, -0.1],
    "frequency_penalty": [2, -2, 2.01, "x"],
    "presence_penalty": [2, -2, -2.01],
    "repetition_penalty": [2, 1e-300, 0, 2.5],
    "n": [1, 2, 5, 0, -1, 129, 2**40, 2.0],
    "seed": [0, -1, 2**63 - 1, -(2**63), 2**63, 2**70, "7"],
    "stop": ["", "a", ["a", "b"], ["a"] * 40, "\x00", "é" * 2000, "\ud83d", ["ok", "\udc00"], [""], 7, ["x", None]],
    "stop_token_ids": [[], [0], [4095], [4096], [-1], [2**31], [2**40], [0.5], list(range(200)), "1"],
    "ignore_eos": [True, False, 1, "yes"],
    "logit_bias": [{"0": 100}, {"4095": -1e308}, {"4096": 1}, {"-1": 1}, {str(2**40): 1}, {"5": "x"}, {"a": 1}, []],
    "regex": ["", "a", "(", "[^", "(a*)*b", "a{3,2}", "." * 300, "\\p{Nope}", "(?<n>a)", "a{1000}", "\ud83d"],
    "ebnf": ["", "root ::= ", "root ::= root", 'root ::= "a"', "x ::= y", 'root ::= "\x00"', "::="],
    "no_stop_trim": [True, 0, "x"],
    "skip_special_tokens": [False, "x"],
}
_SCHEMAS: list[Any] = [
    {},
    {"enum": []},
    {"type": "integer", "minimum": 2**70},
    {"type": "string", "pattern": "("},
    {"type": "integer", "minimum": 5, "maximum": 1},
    {"$ref": "#/nowhere"},
    {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    {"type": "nonsense"},
    {"const": "\ud83d"},
    {"type": "array", "minItems": 10**9},
    _DEEP,
    "{",
    7,
]
_COMPLETION: dict[str, list[Any]] = {
    **_SHARED,
    "max_tokens": [1, 8, 0, -1, 2**31, 2**63, 1.5, 3.0, 200, 10**6],
    "min_tokens": [0, 1, 4, 10**6, -1],
    "logprobs": [0, 1, 20, 21, -1, True, 2**31],
    "echo": [True, 1],
    "cache_salt": ["x" * 5000, "", 3, "\x00"],
    "lora_path": ["nobody", "", 3],
    "model": ["m", "", "base:nobody", ":", "x" * 5000, 3],
    "user": ["u", 3],
    "response_format": [
        *({"type": "json_schema", "json_schema": {"schema": schema}} for schema in _SCHEMAS),
        *({"type": kind} for kind in ("json_object", "text", "xml", None)),
        *({"type": "structural_tag", "structures": value} for value in ([], [{}], 3)),
    ],
    "prompt": [
        *("", "a", "\x00", "\ud83d", "é" * 3000, "word " * 5000, "\U0010ffff" * 50),
        *([0], [4095], [4096], [-1], [2**31], [2**40], [], [1.0], [True], [[1], [2]], [["a"]], ["a", "b"], ["a", 1]),
        *(3, None, {}),
    ],
}


def completion_rows(num: int, seed: int) -> list[dict[str, Any]]:
    """OpenAI rows for completions: first one for each of these values alone, in no order, then some with a few."""
    draw = random.Random(seed)
    values = [{name: value} for name, values in _COMPLETION.items() for value in values]
    draw.shuffle(values)
    while len(values) < num:
        names = draw.sample(sorted(_COMPLETION), draw.choice([2, 2, 3]))
        values.append({name: draw.choice(_COMPLETION[name]) for name in names})
    rows = []
    for i, value in enumerate(values[:num]):
        body = {"model": "m", "prompt": "Say something", "max_tokens": 4} | value
        rows.append({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body})
    return rows


def is_unicode(row: dict[str, Any]) -> bool:
    """Whether the row has no half character; as a line of a file it would be no JSON."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True
