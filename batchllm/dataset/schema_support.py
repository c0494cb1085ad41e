"""Does the grammar keep every keyword of a JSON schema?

The grammar library (xgrammar 0.2.1) takes a schema with keywords that it ignores, and then an answer may break the
schema. Here such a schema is refused, by keyword and path. What the library refuses itself is left to it. Pure: knows
JSON, and by experiment what the library does (``tests/srt/test_schema_grammar.py`` asks it); imports none of it.

INVARIANT: of a schema that passes, every answer that the grammar lets through is valid, formats by their form
(``2023-02-31`` is a date).
"""

from __future__ import annotations

import functools
from typing import Any

import orjson

from batchllm.dataset.schema_objects import check_object
from batchllm.dataset.schema_refs import Refs, are_disjoint, kinds, reference_problem
from batchllm.dataset.schema_values import (
    ENFORCED_FORMATS,
    Problem,
    check_form,
    check_number,
    check_string,
    constrains,
    trivial,
)

_ALTERNATIVES = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""The first of these that a schema has is all that the grammar looks at."""

_IGNORED = ("not", "dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef")
_IGNORED_IN_ARRAYS = ("contains", "uniqueItems")


@functools.lru_cache(maxsize=256)
def schema_problem(text: str) -> str | None:
    """Why the grammar would not keep this schema, with path and keyword; None where it would.

    Args:
        text: JSON. A million rows may share one: it is looked at once.
    """
    root = orjson.loads(text)
    walk = _Walk(root)
    try:
        walk.check(root, "$")
        walk.check_finite()
    except Problem as problem:
        return str(problem)
    except RecursionError:
        return "$: is nested too deeply"
    return None


@functools.lru_cache(maxsize=256)
def grammar_schema(text: str) -> str:
    """What to give to the grammar library in the place of a schema that passes: one that closes its limited strings.

    The library would let control characters into them, which JSON does not have. Key order is kept.
    """
    return orjson.dumps(_with_closed_strings(orjson.loads(text))).decode()


def _with_closed_strings(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_closed_strings(item) for item in value]
    if not isinstance(value, dict):
        return value
    made = {k: v if k in ("const", "enum") else _with_closed_strings(v) for k, v in value.items()}
    least, most = made.get("minLength", 0), made.get("maxLength", "")
    are_lengths = type(least) is int and (most == "" or type(most) is int) and (least, most) != (0, "")
    if are_lengths and "pattern" not in made and made.get("format") not in ENFORCED_FORMATS:
        made = {k: v for k, v in made.items() if k not in ("minLength", "maxLength")}
        made["pattern"] = rf'^[^"\\\x00-\x1f]{{{least},{most}}}$'
    return made


class _Walk:
    """One look at every part of a schema that the grammar is made of; parts behind references once."""

    def __init__(self, root: Any) -> None:
        self._refs = Refs(root)

    def check(self, schema: Any, path: str, default_type: str | None = None) -> None:
        """Raises `Problem` for the first keyword that would not be kept."""
        if schema is False:
            raise Problem(path, "false", "nothing satisfies it")
        if not isinstance(schema, dict):
            return
        check_form(schema, path)
        if not self._refs.is_alone(schema):
            raise Problem(
                path, "properties", "the grammar takes it for another schema here; give one a minProperties of 0"
            )
        for keyword in _IGNORED:
            if keyword in schema and schema[keyword] not in ({}, False):
                raise Problem(path, keyword)
        if "if" in schema and not (trivial(schema.get("then", True)) and trivial(schema.get("else", True))):
            raise Problem(path, "if")
        governing = next((keyword for keyword in _ALTERNATIVES if keyword in schema), None)
        if governing is not None:
            self._check_alternative(schema, governing, path)
            return
        types = schema.get("type", default_type)
        if types is None:
            types = self._type_by_keywords(schema, path)
        elif types == []:
            raise Problem(path, "type", "nothing satisfies an empty list")
        for name in types if isinstance(types, list) else [types]:
            self._check_type(name, schema, path)

    def _type_by_keywords(self, schema: dict[str, Any], path: str) -> list[Any]:
        """What the grammar makes of a schema without a type: objects, arrays, or anything at all."""
        inferred = kinds(schema, self._refs)
        if inferred in ({"object"}, {"array"}):
            return list(inferred)
        for keyword in schema:
            if constrains(schema, keyword):
                raise Problem(path, keyword, "the grammar ignores it without a type beside it; give the type")
        return []

    def _check_alternative(self, schema: dict[str, Any], governing: str, path: str) -> None:
        value = schema[governing]
        if governing == "enum" and value == []:
            raise Problem(path, "enum", "nothing satisfies an empty list")
        if governing == "$ref":
            problem = reference_problem(value, self._refs)
            if problem is not None:
                raise Problem(path, "$ref", problem)
            if self._refs.visit(value):
                self.check(self._refs.target(value), "$" + value[1:].replace("/", "."))
        if governing == "allOf" and len(value) > 1:
            raise Problem(path, "allOf", "several schemas are not enforced together; write them as one")
        if governing in ("anyOf", "oneOf", "allOf"):
            for i, option in enumerate(value):
                self.check(option, f"{path}.{governing}[{i}]")
        if governing == "oneOf" and not are_disjoint(value, self._refs):
            raise Problem(
                path, "oneOf", "that one alone holds is not enforced; use anyOf, or schemas that exclude another"
            )
        self._check_beside(schema, governing, path)

    def _check_beside(self, schema: dict[str, Any], governing: str, path: str) -> None:
        for keyword in schema:
            if keyword == governing or not constrains(schema, keyword):
                continue
            if keyword == "type":
                types = schema["type"]
                allowed = set(types if isinstance(types, list) else [types])
                if "number" in allowed:
                    allowed.add("integer")
                if kinds({governing: schema[governing]}, self._refs) <= allowed:
                    continue
            raise Problem(path, keyword, f"the grammar ignores it beside {governing}; drop it, or put it inside")

    def _check_type(self, name: Any, schema: dict[str, Any], path: str) -> None:
        if name in ("integer", "number"):
            check_number(name, schema, path)
        elif name == "string":
            check_string(schema, path)
        elif name == "object":
            for part, place, default_type in check_object(schema, path, self._refs):
                self.check(part, place, default_type)
        elif name == "array":
            self._check_array(schema, path)

    def _check_array(self, schema: dict[str, Any], path: str) -> None:
        for keyword in _IGNORED_IN_ARRAYS:
            if constrains(schema, keyword):
                raise Problem(path, keyword)
        if isinstance(schema.get("items"), list):
            raise Problem(path, "items", "a list is of an old draft; write prefixItems")
        for i, item in enumerate(schema.get("prefixItems", [])):
            self.check(item, f"{path}.prefixItems[{i}]")
        rest = "items" if "items" in schema else "unevaluatedItems"
        if schema.get(rest, False) is not False:
            self.check(schema[rest], f"{path}.{rest}")

    def check_finite(self) -> None:
        """Refuses references that lead round in a circle without an end: an answer would never be complete."""
        endless = self._refs.endless()
        if endless:
            raise Problem("$" + endless[0][1:].replace("/", "."), "$ref", "every value would hold another, without end")
