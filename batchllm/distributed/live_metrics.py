"""Metrics of several engines, as each tells them to Prometheus, on one page: each with the number of its engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

_LABEL = "replica"


def merged(pages: Mapping[int, str]) -> bytes:
    """One page of the metrics of this process and of what engines have told.

    Args:
        pages: What each engine has told, by its number.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(pages))
    return bytes(generate_latest(registry))


class _Merged:
    def __init__(self, pages: Mapping[int, str]) -> None:
        self._pages = pages

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for engine, page in sorted(self._pages.items()):
            for family in text_string_to_metric_families(page):
                metric = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    metric.add_sample(sample.name, {**sample.labels, _LABEL: str(engine)}, sample.value)
        yield from found.values()
        yield from (metric for metric in REGISTRY.collect() if metric.name not in found)
