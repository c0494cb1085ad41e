"""Which keywords of numbers and strings the grammar keeps. Part of `schema_support`.

The rules for bounds are those of the library's ranges, mistakes included: some of its ranges let numbers in that are
out of bounds, and those are refused here.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

ANY_KIND = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_NUMBERS = frozenset({"integer", "number"})
_STRING, _ARRAY, _OBJECT = frozenset({"string"}), frozenset({"array"}), frozenset({"object"})

_CONSTRAINED: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("type", "const", "enum", "anyOf", "oneOf", "allOf", "$ref"), ANY_KIND),
    **dict.fromkeys(("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBERS),
    **dict.fromkeys(("minLength", "maxLength", "pattern", "format"), _STRING),
    **dict.fromkeys(("items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"), _ARRAY),
    "unevaluatedItems": _ARRAY,
    **dict.fromkeys(("properties", "patternProperties", "additionalProperties", "propertyNames"), _OBJECT),
    **dict.fromkeys(("required", "minProperties", "maxProperties", "unevaluatedProperties"), _OBJECT),
}
"""Kinds of values that a keyword says something about. Other keywords constrain nothing, or are refused by name."""

_SAYS_NOTHING: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("minLength", "minItems", "minProperties"), (0,)),
    "uniqueItems": (False,),
    **dict.fromkeys(("required", "prefixItems"), ([],)),
    **dict.fromkeys(("properties", "patternProperties"), ({},)),
    **dict.fromkeys(("items", "additionalProperties", "propertyNames"), (True, {})),
    **dict.fromkeys(("unevaluatedItems", "unevaluatedProperties"), (True, {})),
}

ENFORCED_FORMATS = frozenset(
    {
        *("date", "time", "date-time", "duration", "email", "hostname"),
        *("ipv4", "ipv6", "uri", "uri-reference", "uri-template", "uuid"),
    }
)
UNENFORCED_FORMATS = frozenset(
    {
        *("idn-email", "idn-hostname", "iri", "iri-reference", "regex"),
        # Enforced, but a quotation mark in them would not be escaped.
        *("json-pointer", "relative-json-pointer"),
    }
)
"""Of JSON Schema's formats; what others are called says nothing, as the specification has it."""

UNSAFE = frozenset({*map(chr, range(32)), '"', "\\"})
"""Characters that JSON writes with an escape, which the grammar of a pattern does not."""
_ESCAPES = {
    "d": string.digits,
    "w": f"{string.ascii_letters}{string.digits}_",
    "s": "\t\n\v\f\r ",
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "f": "\f",
    "v": "\v",
    "0": "\0",
}
"""ASCII characters that an escaped letter of a pattern may be."""
_ASCII = frozenset(map(chr, range(128)))


class Problem(Exception):
    """A keyword at a path would not be kept."""

    def __init__(self, path: str, keyword: str, why: str = "it is not enforced by the grammar; drop it") -> None:
        super().__init__(f"{path}: {keyword}: {why}")


_FORMS: Mapping[str, type] = {
    **dict.fromkeys(("format", "pattern", "$ref"), str),
    **dict.fromkeys(("required", "enum", "anyOf", "oneOf", "allOf", "prefixItems"), list),
    **dict.fromkeys(("properties", "patternProperties"), dict),
}
_FORM_NAMES: Mapping[type, str] = {str: "a string", list: "a list", dict: "an object"}


def check_form(schema: Mapping[str, Any], path: str) -> None:
    """Raises `Problem` where a keyword has a value of the wrong form."""
    for keyword, form in _FORMS.items():
        if keyword in schema and not isinstance(schema[keyword], form):
            raise Problem(path, keyword, f"must be {_FORM_NAMES[form]}")
    for keyword in ("type", "required"):
        names = schema.get(keyword, [])
        if not all(isinstance(name, str) for name in (names if isinstance(names, list) else [names])):
            raise Problem(path, keyword, "must be made of names")


def trivial(schema: Any) -> bool:
    """Everything satisfies it."""
    return schema is True or (isinstance(schema, dict) and not any(constrains(schema, k) or k == "not" for k in schema))


def constrains(schema: Mapping[str, Any], keyword: str) -> bool:
    """Whether this keyword of a schema shuts anything out, given the schema's type."""
    about = _CONSTRAINED.get(keyword)
    if (
        about is None
        or keyword not in schema
        or any(schema[keyword] == nothing for nothing in _SAYS_NOTHING.get(keyword, ()))
    ):
        return False
    if (
        keyword == "format"
        and isinstance(schema[keyword], str)
        and schema[keyword] not in ENFORCED_FORMATS | UNENFORCED_FORMATS
    ):
        return False
    types = schema.get("type")
    if about == ANY_KIND or types is None:
        return True
    return any(kind in about for kind in (types if isinstance(types, list) else [types]) if isinstance(kind, str))


# Numbers


def check_number(kind: str, schema: Mapping[str, Any], path: str) -> None:
    """Raises `Problem` where a bound is not kept, or there is another constraint."""
    if "multipleOf" in schema and not (kind == "integer" and schema["multipleOf"] == 1):
        raise Problem(path, "multipleOf")
    bounds = {k: schema[k] for k in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum") if k in schema}
    if any(isinstance(bound, bool) or not isinstance(bound, (int, float)) for bound in bounds.values()):
        return  # the library refuses it
    for keyword, other in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if keyword in bounds and other in bounds:
            raise Problem(path, keyword, f"the grammar ignores it beside {other}; give one of them")
    if not bounds or (_is_integer_range_kept if kind == "integer" else _is_number_range_kept)(bounds):
        return
    said = " and ".join(f"{keyword} {bound}" for keyword, bound in bounds.items())
    raise Problem(
        path, next(iter(bounds)), f"{said} of a {kind} is not enforced by the grammar; drop it or list values in enum"
    )


def _is_integer_range_kept(bounds: Mapping[str, float]) -> bool:
    if any(bound != int(bound) for bound in bounds.values()):
        return True  # the library refuses it
    low = bounds.get("minimum", bounds.get("exclusiveMinimum", -1) + ("exclusiveMinimum" in bounds))
    high = bounds.get("maximum", bounds.get("exclusiveMaximum", 0) - ("exclusiveMaximum" in bounds))
    has_low = "minimum" in bounds or "exclusiveMinimum" in bounds
    has_high = "maximum" in bounds or "exclusiveMaximum" in bounds
    return _is_range_kept(int(low) if has_low else None, int(high) if has_high else None)


def _is_number_range_kept(bounds: Mapping[str, float]) -> bool:
    """A whole lower or upper bound alone; the library's fractions and its exclusive bounds let too much in."""
    if len(bounds) != 1 or any(bound != int(bound) for bound in bounds.values()):
        return False
    if "minimum" in bounds:
        low = int(bounds["minimum"])
        return low in (-1, 0, 1) or low >= 9
    if "maximum" in bounds:
        high = int(bounds["maximum"])
        return high in (-1, 0, 1) or (high > 1 and _is_range_kept(None, high - 1))
    return False


def _is_range_kept(low: int | None, high: int | None) -> bool:
    """Whether the library's range of integers is exact."""
    if high is None:
        return low is None or low in (0, 1) or low >= 10
    if low is None:
        return high in (-1, 0) or (high > 0 and _are_lengths_kept(1, high))
    if low > high:
        return True  # the library refuses it
    is_negative_kept = low >= 0 or _are_lengths_kept(max(1, -high), -low)
    return is_negative_kept and (high <= 0 or _are_lengths_kept(max(1, low), high))


def _are_lengths_kept(low: int, high: int) -> bool:
    """The same of positive integers, which the library goes through by their number of digits."""
    for num_digits in range(len(str(low)), len(str(high)) + 1):
        least, most = 10 ** (num_digits - 1), 10**num_digits - 1
        first, last = str(max(low, least)), str(min(high, most))
        common = next((i for i, (a, b) in enumerate(zip(first, last, strict=True)) if a != b), num_digits)
        if common >= num_digits - 1:
            continue
        if common > 0 and common == num_digits - 2:
            if first[-1] != "0" or last[-1] != "9":
                return False
        elif common > 0 and int(first) != least and int(last) != most:
            return False
    return True


# Strings


def check_string(schema: Mapping[str, Any], path: str) -> None:
    """Raises `Problem` where one of the constraints of a string is not kept."""
    written = schema.get("format")
    if written in UNENFORCED_FORMATS:
        raise Problem(path, "format", f"{written!r} is not enforced by the grammar; drop it")
    first = "format" if written in ENFORCED_FORMATS else "pattern"
    if first in schema:
        for keyword in ("pattern", "minLength", "maxLength"):
            if keyword != first and constrains(schema, keyword):
                raise Problem(path, keyword, f"the grammar ignores it beside {first}; give one of them")
    if first == "pattern" and isinstance(schema.get("pattern"), str):
        problem = pattern_problem(schema["pattern"])
        if problem is not None:
            raise Problem(path, "pattern", problem)


_MISREAD = frozenset("ghijlmoqyzACEFGHIJKLMNOQRTVXYZ")
_PATTERN_PART = re.compile(r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|\[(?:\\.|[^\]\\])*\]|\(\?(?::|<\w+>)|.", re.DOTALL)
_CLASS_PART = re.compile(r"(\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\.|.)", re.DOTALL)


def misread_escape(pattern: str) -> str | None:
    """The first escape of a letter that the grammar takes for the letter itself; None where there is none."""
    return next((found for found in re.findall(r"\\.", pattern, re.DOTALL) if found[1] in _MISREAD), None)


def pattern_problem(pattern: str) -> str | None:
    """Why a string of the grammar of this pattern need not be JSON, or need not match; None where it is and does."""
    body = pattern.removeprefix("^")
    if body.endswith("$") and (len(body) - len(body[:-1].rstrip("\\"))) % 2:
        body = body[:-1]
    depth = 0
    for part in _PATTERN_PART.findall(body):
        if part == "|" and depth == 0:
            return "alternatives need brackets around them, ^(a|b)$"
        if part in ("^", "$"):
            return f"{part} in the middle is ignored by the grammar; drop it"
        depth += part.startswith("(") - (part == ")")
        is_class = part.startswith("[") and len(part) > 1
        found = _class_characters(part[1:-1]) if is_class else _characters(part)
        if found is None:
            return f"{part} is not known to the grammar"
        if not found.isdisjoint(UNSAFE):
            return (
                f"{part} may be a quotation mark, a backslash or a control character, which the grammar does not "
                r'escape; shut them out, as [^"\\\x00-\x1f] does'
            )
    return None


def _characters(part: str) -> frozenset[str] | None:
    """ASCII characters that one part of a pattern may be; None where the part is not known."""
    if part == ".":
        return _ASCII
    if not part.startswith("\\") or part == "\\":
        return frozenset(part)
    if part[1] in "xu" and len(part) > 2:
        return frozenset(chr(int(part[2:], 16)))
    if part[1] in _ESCAPES:
        return frozenset(_ESCAPES[part[1]])
    if part[1] in "DWS":
        return _ASCII.difference(_ESCAPES[part[1].lower()])
    return None if part[1].isalnum() else frozenset(part[1])


def _class_characters(body: str) -> frozenset[str] | None:
    """ASCII characters that a class may be, given what is between its brackets."""
    is_negated = body.startswith("^")
    parts = _CLASS_PART.findall(body[is_negated:])
    found: set[str] = set()
    i = 0
    while i < len(parts):
        first = _characters(parts[i]) if parts[i] != "." else frozenset(".")
        if first is None:
            return None
        if parts[i + 1 : i + 2] == ["-"] and i + 2 < len(parts):
            last = _characters(parts[i + 2]) if parts[i + 2] != "." else frozenset(".")
            if last is None or len(first) != 1 or len(last) != 1:
                return None
            found |= {chr(c) for c in range(ord(min(first)), min(ord(min(last)), 127) + 1)}
            i += 3
        else:
            found |= first
            i += 1
    return _ASCII - found if is_negated else frozenset(found)
