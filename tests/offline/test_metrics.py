"""Metrics: what an HTTP client gets is what `Progress` says, and nothing runs afterwards."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import openmetrics, parser
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from batchllm.errors import ConfigError
from batchllm.offline.metrics import MetricsServer
from batchllm.offline.progress import Progress

Samples = dict[tuple[str, str], float]


def get(port: int, accept: str = "text/plain") -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as response:
        text: str = response.read().decode()
    return text


def scrape(port: int) -> Samples:
    families = parser.text_string_to_metric_families(get(port))
    return {(s.name, "".join(s.labels.values())): s.value for family in families for s in family.samples}


def test_counts_of_the_run_are_served() -> None:
    now = [10.0]
    progress = Progress(100, num_done_before=40, show=False, clock=lambda: now[0])
    with MetricsServer(progress, 0) as server:
        now[0] += 6
        progress.update(num_rows=20, num_failed=3, num_prompt_tokens=900, num_computed=200, num_output_tokens=70)
        progress.set_num_engine_restarts(2)
        assert scrape(server.port) == {
            ("batchllm_rows_total", "answered"): 17,
            ("batchllm_rows_total", "failed"): 3,
            ("batchllm_job_rows", ""): 100,
            ("batchllm_job_rows_done_before", ""): 40,
            ("batchllm_prompt_tokens_total", "computed"): 200,
            ("batchllm_prompt_tokens_total", "reused"): 700,
            ("batchllm_output_tokens_total", ""): 70,
            ("batchllm_engine_restarts_total", ""): 2,
            ("batchllm_seconds_left", ""): 12,
            ("batchllm_start_time_seconds", ""): progress.started_at,
        }
        progress.update(num_rows=1)
        assert scrape(server.port)["batchllm_rows_total", "answered"] == 18


def test_what_is_not_known_is_left_out() -> None:
    with MetricsServer(Progress(show=False), 0) as server:
        names = {name for name, _ in scrape(server.port)}
    assert "batchllm_rows_total" in names
    assert not names & {"batchllm_job_rows", "batchllm_seconds_left"}


def test_the_reused_tokens_never_fall() -> None:
    """Prompt tokens of requests that run are counted as computed before they are counted as prompts."""
    progress = Progress(10, show=False)
    with MetricsServer(progress, 0) as server:
        seen = []
        for num_prompt, num_computed in ((0, 50), (100, 0), (0, 30), (50, 0)):
            progress.update(num_prompt_tokens=num_prompt, num_computed=num_computed)
            seen.append(scrape(server.port)["batchllm_prompt_tokens_total", "reused"])
    assert seen == [0, 50, 50, 70]


def test_the_exposition_is_openmetrics_too() -> None:
    """That format refuses two families of one name; it is what a Prometheus server asks for."""
    with MetricsServer(Progress(3, show=False), 0) as server:
        text = get(server.port, accept=openmetrics.exposition.CONTENT_TYPE_LATEST)
    assert text.endswith("# EOF\n")
    assert len(list(parse_openmetrics(text))) == 7


def test_nothing_is_left_when_it_is_closed() -> None:
    before = set(threading.enumerate())
    server = MetricsServer(Progress(1, show=False), 0)
    assert len(set(threading.enumerate()) - before) == 1
    server.close()
    server.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(server.port)


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--metrics-port {port}: .*in use.*another port"):
            MetricsServer(Progress(1, show=False), port)


def test_a_port_that_cannot_be_is_told() -> None:
    with pytest.raises(ConfigError, match=r"--metrics-port 70000: cannot listen there"):
        MetricsServer(Progress(1, show=False), 70000)
