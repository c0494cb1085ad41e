"""Workloads by a line of text, such as ``shared:prefix=2000,private=200,sharing=16,requests=6400,output=100``.

Knows: kinds, keys and their defaults. Must not know: how a workload is made.
Invariant: what is wrong is named, with what would be right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from batchllm.errors import ConfigError
from batchllm.sim.workload import OutputDraw, SimWorkload, shared, snippet, unshared

_SHARED = {"prefix": 2000.0, "private": 200.0, "sharing": 16.0, "requests": 6400.0, "output": 100.0}
_OUTPUT = {"sigma": 0.0, "max_new": 0.0, "known": 1.0, "seed": 0.0}

WORKLOAD_KINDS: Mapping[str, Mapping[str, float]] = {
    "shared": {**_SHARED, **_OUTPUT},
    "lognormal": {**_SHARED, **_OUTPUT, "sigma": 1.0, "max_new": 1024.0, "known": 0.0},
    "snippet": {"requests": 8000.0, "delay": 1000.0, "output": 100.0, **_OUTPUT},
    "unshared": {"prompt": 1000.0, "requests": 2000.0, "output": 100.0, **_OUTPUT},
}
"""Keys of each kind with their defaults.

``prefix``, ``private``, ``prompt``: tokens. ``sharing``: requests a prefix. ``output``: median tokens generated;
``sigma``: spread of their logarithm; ``max_new``: where they are cut, 0 for 4096 (or ``output`` without ``sigma``);
``known``: 1 where the scheduler knows them. ``delay``: mean distance of a query from its document's time, in queries.
"""

_LEAST = {"sigma": 0.0, "max_new": 0.0, "known": 0.0, "seed": 0.0, "delay": 0.0}
_REAL_KEYS = ("sigma", "delay")


def parse_workload(spec: str) -> SimWorkload:
    """The workload that a line of text names: ``kind`` or ``kind:key=value,key=value``.

    Raises:
        ConfigError: No such kind or key, or a value that is not a number or too small; lists those known.
    """
    kind, _, rest = spec.partition(":")
    if kind not in WORKLOAD_KINDS:
        raise ConfigError(f"workload {spec!r}: kind {kind!r} is not known. Known: {', '.join(WORKLOAD_KINDS)}")
    values = dict(WORKLOAD_KINDS[kind])
    given: set[str] = set()
    for item in filter(None, rest.split(",")):
        key, equals, text = item.partition("=")
        if key not in values or not equals:
            raise ConfigError(
                f"workload {spec!r}: {item!r} is not a setting of {kind!r}. Known: "
                + ", ".join(f"{name}={default:g}" for name, default in WORKLOAD_KINDS[kind].items())
            )
        if key in given:
            raise ConfigError(f"workload {spec!r}: {key} is there twice; give it once")
        given.add(key)
        values[key] = _number(key, text, spec)
    if values["sigma"] == 0 and 0 < values["max_new"] < values["output"]:
        raise ConfigError(f"workload {spec!r}: max_new is below output; every output would be cut")
    if values["known"] > 1:
        raise ConfigError(f"workload {spec!r}: known must be 0 or 1, not {values['known']:g}")
    return _MAKERS[kind](values)


def _number(key: str, text: str, spec: str) -> float:
    least = _LEAST.get(key, 1.0)
    try:
        value = float(text) if key in _REAL_KEYS else float(int(text))
    except ValueError:
        value = float("nan")
    if not least <= value < 2**31:
        noun = "a number" if key in _REAL_KEYS else "a whole number"
        raise ConfigError(f"workload {spec!r}: {key} must be {noun} of at least {least:g}, not {text!r}")
    return value


def _output(values: Mapping[str, float]) -> OutputDraw:
    return OutputDraw(
        median_len=int(values["output"]),
        sigma=values["sigma"],
        max_new_len=int(values["max_new"]),
        is_known=values["known"] == 1,
    )


def _shared(values: Mapping[str, float]) -> SimWorkload:
    return shared(
        prefix_len=int(values["prefix"]),
        private_len=int(values["private"]),
        sharing=int(values["sharing"]),
        num_requests=int(values["requests"]),
        output=_output(values),
        seed=int(values["seed"]),
    )


def _snippet(values: Mapping[str, float]) -> SimWorkload:
    return snippet(
        num_requests=int(values["requests"]),
        delay=values["delay"],
        output=_output(values),
        seed=int(values["seed"]),
    )


def _unshared(values: Mapping[str, float]) -> SimWorkload:
    return unshared(
        prompt_len=int(values["prompt"]),
        num_requests=int(values["requests"]),
        output=_output(values),
        seed=int(values["seed"]),
    )


_MAKERS: Mapping[str, Callable[[Mapping[str, float]], SimWorkload]] = {
    "shared": _shared,
    "lognormal": _shared,
    "snippet": _snippet,
    "unshared": _unshared,
}
