"""Answers against the JSON schemas that they were asked to satisfy, where the grammar does not keep all of them."""

from __future__ import annotations

import functools
from typing import Any

import orjson


def schema_error(schema: str, text: str) -> str | None:
    """What of an answer breaks a schema, with its place; None where nothing does.

    Args:
        schema: JSON.
        text: The answer.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as fault:
        return f"the answer is not JSON: {fault}"
    from jsonschema import exceptions

    try:
        found = exceptions.best_match(_validator(schema).iter_errors(value))
    except Exception as fault:  # a schema that is none: a reference to nowhere, an endless one
        return f"the schema cannot be checked: {fault}"
    return None if found is None else f"{found.json_path}: {found.message}"


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator, validators
    from referencing import Registry

    parsed = orjson.loads(schema)
    # With a registry of its own it fetches nothing.
    return validators.validator_for(parsed, default=Draft202012Validator)(parsed, registry=Registry())
