"""Which keywords of objects the grammar keeps. Part of `schema_support`.

In the grammar an object has the properties that the schema names, in that order; then others, if it allows any, by a
pattern of their names or under any name, that of a named property included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from batchllm.dataset.schema_refs import Refs, kinds
from batchllm.dataset.schema_values import UNSAFE, Problem, constrains, pattern_problem, trivial

Part = tuple[Any, str, str | None]
"""A schema inside, its path, and the type that it has where it names none."""


def check_object(schema: dict[str, Any], path: str, refs: Refs) -> Iterator[Part]:
    """Raises `Problem` where a keyword is not kept; gives the schemas inside, which are for the caller to check."""
    properties, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
    open_by, others = _others(schema)
    for name in schema.get("required", []):
        if name not in properties:
            raise Problem(path, "required", f"{name!r} is not in properties, and the grammar ignores it; add it there")
    for name, part in properties.items():
        if not UNSAFE.isdisjoint(name):
            raise Problem(path, "properties", f"the grammar cannot write the name {name!r}")
        yield part, f"{path}.properties.{name}", None
        if open_by is not None and not trivial(part) and part != others:
            raise Problem(path, open_by, f"the grammar lets {name!r} come again with any such value; say false")
    yield from _check_patterns(schema, path, properties, patterns, open_by, others)
    if "propertyNames" in schema and not trivial(schema["propertyNames"]):
        yield _names_part(schema, path)
        names = schema["propertyNames"]
        if isinstance(names, dict) and not kinds({"type": "string", **names}, refs) <= {"string"}:
            raise Problem(path, "propertyNames", "a name must be a string")
    is_counted = constrains(schema, "minProperties") and schema["minProperties"] != 1
    if is_counted and (open_by is not None or patterns or "propertyNames" in schema):
        raise Problem(path, "minProperties", "the grammar counts a repeated property twice; list them in required")
    if open_by is not None:
        yield others, f"{path}.{open_by}", None


def _others(schema: dict[str, Any]) -> tuple[str | None, Any]:
    """The keyword that allows properties under any name, and their schema; None where they are not allowed."""
    for keyword in ("additionalProperties", "unevaluatedProperties"):
        if keyword in schema:
            return (None, False) if schema[keyword] is False else (keyword, schema[keyword])
    return None, False


def _check_patterns(
    schema: dict[str, Any],
    path: str,
    properties: dict[str, Any],
    patterns: dict[str, Any],
    open_by: str | None,
    others: Any,
) -> Iterator[Part]:
    parts = list(patterns.values())
    if any(part != parts[0] for part in parts):
        raise Problem(
            path, "patternProperties", "a name that two patterns match is held to one of them; give one pattern"
        )
    for pattern, part in patterns.items():
        problem = pattern_problem(pattern)
        if problem is not None:
            raise Problem(path, "patternProperties", problem)
        for name, named in properties.items():
            if part != named and _may_match(pattern, name):
                raise Problem(path, "patternProperties", f"{name!r} is in properties too; leave it out of the pattern")
        if properties and open_by is not None and part != others:
            raise Problem(path, open_by, "is not enforced beside properties and patternProperties; say false")
        yield part, f"{path}.patternProperties.{pattern}", None


def _names_part(schema: dict[str, Any], path: str) -> Part:
    for keyword in ("properties", "patternProperties", "additionalProperties", "unevaluatedProperties"):
        if constrains(schema, keyword):
            raise Problem(path, "propertyNames", f"is not enforced beside {keyword}; give one of them")
    return schema["propertyNames"], f"{path}.propertyNames", "string"


def _may_match(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return True
