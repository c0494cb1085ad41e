"""References inside a schema, and what can be told of schemas behind them. Part of `schema_support`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import orjson

from batchllm.dataset.schema_values import ANY_KIND

_OF_OBJECTS = ("properties", "additionalProperties", "unevaluatedProperties")
_OF_ARRAYS = ("items", "prefixItems", "unevaluatedItems")
_MAX_DEPTH = 16
"""References and properties followed before nothing more is said."""


_NOT_SEEN = frozenset(
    {"title", "default", "description", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$schema"}
)
"""The library remembers schemas without these keys, and drops them where they are names of properties too."""
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_OF_VALUES = ("const", "enum")


class Refs:
    """The references of a schema: what each leads to, and which have been seen."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._seen: list[str] = []
        self._remembered: dict[bytes, bytes] = {}

    def is_alone(self, schema: dict[str, Any]) -> bool:
        """Whether no other schema seen so far looks the same to the library."""
        key, plain = (
            orjson.dumps(_without_notes(schema, drops_names=drops), option=orjson.OPT_SORT_KEYS)
            for drops in (True, False)
        )
        return self._remembered.setdefault(key, plain) == plain

    def target(self, uri: str) -> Any:
        """What a reference leads to; None where there is nothing. Looked up as the grammar library does."""
        found = self._root
        for part in uri[1:].split("/"):
            if part:
                found = found.get(part) if isinstance(found, dict) else None
        return found

    def visit(self, uri: str) -> bool:
        """Whether it is seen for the first time."""
        if uri in self._seen:
            return False
        self._seen.append(uri)
        return True

    def endless(self) -> list[str]:
        """References seen that lead to no value of finite size; "#" among them where the whole schema has none."""
        left = ["#", *(uri for uri in self._seen if uri != "#")]
        ending: set[str] = set()
        while True:
            found = [uri for uri in left if self._ends(self.target(uri), ending)]
            if not found:
                return left
            ending.update(found)
            left = [uri for uri in left if uri not in ending]

    def _ends(self, schema: Any, ending: set[str]) -> bool:
        """Whether it has a value of finite size, given references of which that is known."""
        if not isinstance(schema, dict):
            return schema is not False
        if "$ref" in schema:
            return schema["$ref"] in ending
        if "const" in schema or "enum" in schema:
            return True
        for keyword in ("anyOf", "oneOf", "allOf"):
            if isinstance(schema.get(keyword), list):
                options = [self._ends(option, ending) for option in schema[keyword]]
                return all(options) if keyword == "allOf" else any(options)
        types = kinds(schema, self)
        if types == {"object"}:
            properties, required = schema.get("properties"), schema.get("required")
            if isinstance(properties, dict) and isinstance(required, list):
                return all(self._ends(properties.get(name), ending) for name in required)
        if types == {"array"}:
            prefix, least = schema.get("prefixItems"), schema.get("minItems", 0)
            first = prefix if isinstance(prefix, list) else []
            more = [schema.get("items")] if isinstance(least, int) and least > len(first) else []
            return all(self._ends(item, ending) for item in [*first, *more])
        return True


def reference_problem(uri: Any, refs: Refs) -> str | None:
    """Why the grammar would not follow a reference; None where it does."""
    if not isinstance(uri, str):
        return "must be a string"
    if uri != "#" and not uri.startswith("#/"):
        return f"{uri!r} is not followed by the grammar; refer to a place in this schema, as #/$defs/name"
    if not isinstance(refs.target(uri), (dict, bool)):
        return f"{uri!r} leads to no schema that the grammar finds; use plain names behind #/$defs/"
    return None


def kinds(schema: Any, refs: Refs, depth: int = 0) -> set[str]:
    """Kinds of values that the grammar of a schema may write: JSON's types, "integer" where it is whole."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return set(ANY_KIND)
    if "$ref" in schema:
        uri = schema["$ref"]
        return set(ANY_KIND) if reference_problem(uri, refs) else kinds(refs.target(uri), refs, depth + 1)
    if "const" in schema:
        return {_kind(schema["const"])}
    if isinstance(schema.get("enum"), list):
        return {_kind(value) for value in schema["enum"]}
    for keyword in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(keyword), list):
            return set().union(*(kinds(option, refs, depth + 1) for option in schema[keyword]))
    if "type" in schema:
        types = schema["type"]
        found = set(types if isinstance(types, list) else [types])
        return found | {"integer"} if "number" in found else found
    if any(keyword in schema for keyword in _OF_OBJECTS):
        return {"object"}
    if any(keyword in schema for keyword in _OF_ARRAYS):
        return {"array"}
    return set(ANY_KIND)


def are_disjoint(options: Sequence[Any], refs: Refs) -> bool:
    """Whether no value can satisfy two of these schemas, as far as it is plain: by type, value, or a tag."""
    return all(_exclude(a, b, refs) for a, b in itertools.combinations(options, 2))


def _exclude(a: Any, b: Any, refs: Refs, depth: int = 0) -> bool:
    a, b = _followed(a, refs), _followed(b, refs)
    if depth > _MAX_DEPTH or not isinstance(a, dict) or not isinstance(b, dict):
        return False
    of_a, of_b = kinds(a, refs), kinds(b, refs)
    if of_a.isdisjoint(of_b):
        return True
    values_a, values_b = _values(a), _values(b)
    if values_a is not None and values_b is not None:
        return not any(_kind(x) == _kind(y) and x == y for x in values_a for y in values_b)
    if of_a != {"object"} or of_b != {"object"}:
        return False
    tags = [name for name in _list(a, "required") if name in _list(b, "required")]
    parts_a, parts_b = _dict(a, "properties"), _dict(b, "properties")
    return any(
        name in parts_a and name in parts_b and _exclude(parts_a[name], parts_b[name], refs, depth + 1) for name in tags
    )


def _without_notes(value: Any, *, drops_names: bool, is_schema: bool = True) -> Any:
    if isinstance(value, list):
        return [_without_notes(item, drops_names=drops_names, is_schema=is_schema) for item in value]
    if not isinstance(value, dict):
        return value
    drops = is_schema or drops_names
    return {
        key: _without_notes(
            item, drops_names=drops_names, is_schema=not is_schema or key not in (*_OF_NAMES, *_OF_VALUES)
        )
        for key, item in value.items()
        if not (drops and key in _NOT_SEEN)
    }


def _followed(schema: Any, refs: Refs) -> Any:
    for _ in range(_MAX_DEPTH):
        if not isinstance(schema, dict) or "$ref" not in schema or reference_problem(schema["$ref"], refs):
            return schema
        schema = refs.target(schema["$ref"])
    return None


def _values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return {int: "integer", str: "string", list: "array", dict: "object"}.get(type(value), "null")


def _list(schema: dict[str, Any], keyword: str) -> list[Any]:
    return schema[keyword] if isinstance(schema.get(keyword), list) else []


def _dict(schema: dict[str, Any], keyword: str) -> dict[str, Any]:
    return schema[keyword] if isinstance(schema.get(keyword), dict) else {}
