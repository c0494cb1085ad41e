"""Which rows may share KV: those of one namespace.

Knows names and numbers; not rows, tokens or caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from batchllm.tokens import Int64Array


class Namespace(NamedTuple):
    """Prompts of different namespaces never share KV: a prefix has other KV behind another adapter.

    Attributes:
        adapter: Name of the LoRA adapter, "" for the base model.
        name: What the row calls it, "" for the default one.
    """

    adapter: str
    name: str


def adapter_numbers(all_namespaces: Sequence[Namespace], namespaces: Int64Array | None) -> Int64Array | None:
    """Number of the adapter of each sample; None where the base model answers all.

    Args:
        all_namespaces: The namespaces, by number.
        namespaces: Number of the namespace of each sample; None where all are in the default one.
    """
    numbers: dict[str, int] = {"": 0}
    of_namespace = [numbers.setdefault(namespace.adapter, len(numbers)) for namespace in all_namespaces]
    return None if namespaces is None or len(numbers) == 1 else np.array(of_namespace, np.int64)[namespaces]
