"""Batches in Ray Data: a dataset put in the order of its prefixes, and an engine as the worker that answers it.

    units = batchllm.ray.plan(dataset)
    answers = units.map_batches(
        batchllm.ray.BatchStage,
        fn_constructor_kwargs={"model_path": "MODEL"},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=1),
        num_gpus=1,
    )

    keys      what rows are sorted by
    units     `plan`: rows that share prefixes, together
    stage     `BatchStage`: an engine in an actor of Ray Data

Knows Ray Data. What distributes, sorts, moves, retries and stores is Ray Data; which rows belong together, and what
an engine does with them, is decided where it is decided for files. Importing this imports no Ray.
"""

from __future__ import annotations

from batchllm.ray.stage import BatchStage
from batchllm.ray.units import plan

__all__ = ["BatchStage", "plan"]
