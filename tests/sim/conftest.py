"""Small machines and small workloads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from batchllm.perf_model import CostModel, get_device, get_model
from batchllm.sim import SimWorkload
from batchllm.tokens import TokenTable


@pytest.fixture(scope="session")
def cost_model() -> CostModel:
    return CostModel.with_defaults(get_device("A100-80GB"), get_model("Llama-3.1-8B"))


@st.composite
def prompts(draw: st.DrawFn) -> list[list[int]]:
    """Prompts that begin as others do: grown from earlier ones, repeated, cut, or new."""
    found: list[list[int]] = []
    for _ in range(draw(st.integers(1, 24))):
        kind = draw(st.sampled_from(["grow", "grow", "repeat", "cut", "new"])) if found else "new"
        base = list(draw(st.sampled_from(found))) if kind != "new" else []
        if kind == "cut":
            base = base[: draw(st.integers(1, len(base)))]
        if kind in ("grow", "new"):
            base += [draw(st.integers(0, 2))] * draw(st.integers(1, 20))
            base += draw(st.lists(st.integers(0, 2), max_size=5))
        found.append(base)
    return found


@st.composite
def workloads(draw: st.DrawFn, *, is_known: bool | None = None) -> SimWorkload:
    """Any small workload; ``is_known`` None leaves some lengths to be learned."""
    rows = draw(prompts())
    n = len(rows)
    max_new = draw(st.lists(st.integers(1, 14), min_size=n, max_size=n))
    output = [draw(st.integers(1, limit)) for limit in max_new]
    tells = [draw(st.booleans()) if is_known is None else is_known for _ in rows]
    return SimWorkload.from_lengths(
        "drawn",
        TokenTable.from_lists(rows),
        np.array(output, np.int64),
        max_new_len=np.array(max_new, np.int64),
        known_len=np.array([length if told else 0 for length, told in zip(output, tells, strict=True)], np.int64),
        task=np.array([draw(st.integers(-1, 1)) for _ in rows], np.int32),
    )
