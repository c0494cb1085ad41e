"""Compiles the numba functions of planning before a job needs them: what was compiled is kept, for this processor.

    python -m batchllm.offline.compile_ahead

``scripts/setup`` runs it. Where it has not run, a driver does it while its engine starts.
"""

from __future__ import annotations

import itertools

import numpy as np

from batchllm.attention.layout import PrefixPaths, plan_layout
from batchllm.planner import GROUP_ORDERS, expected_work, explain, partition, plan_batch
from batchllm.planner.fair_order import fair_order
from batchllm.planner.planner import RunCutter
from batchllm.planner.shards import TableSource, split_by_prefix
from batchllm.tokens import TokenTable


def compile_ahead(*, with_all: bool = False) -> None:
    """Plan a small job, so that each function is compiled for the types that jobs call it with.

    Args:
        with_all: Compile also what only some jobs need: other group orders, shards, fair plans, units, summaries.
    """
    prompts = [
        [1, group, 2, branch, 3, leaf] for group, branch, leaf in itertools.product(range(4), range(3), range(2))
    ]
    table = TokenTable.from_lists([*prompts, prompts[0], [9]])
    decode_lens = np.full(len(table), 4, np.int64)
    plan = plan_batch(table, decode_lens=decode_lens, group_order="balanced")
    RunCutter(plan, table, decode_lens).cut(0, len(table))
    if not with_all:
        return
    owners = np.arange(len(table)) % 2
    namespaces = owners.astype(np.int64)
    for group_order in GROUP_ORDERS:
        plan_batch(table, page_size=2, namespaces=namespaces, decode_lens=decode_lens, group_order=group_order)
    explain(plan, table)
    fair_order(plan, owners, decode_lens, quantum=1)
    partition(plan, expected_work(plan, decode_lens), 2)
    split_by_prefix(TableSource(table), max_shard_tokens=40, namespaces=namespaces)
    paths = PrefixPaths()
    leaf = paths.add(paths.add(-1, 8), 16)
    lens = np.full(3, 1, np.int32)
    plan_layout(
        table_rows=np.arange(3, dtype=np.int32),
        qo_len=lens,
        kv_len=lens * 20,
        leaf=np.full(3, leaf, np.int32),
        paths=paths,
    )


if __name__ == "__main__":
    compile_ahead(with_all=True)
