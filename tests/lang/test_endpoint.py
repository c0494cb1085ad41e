"""`Endpoint` over real HTTP, to a server that answers as the fake engine does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import sglang as sgl
from hypothesis import given
from hypothesis import strategies as st

from batchllm.lang import Endpoint
from batchllm.lang.endpoint import merge, split
from tests.lang.fake_server import answer

REFUSED = "TOO LONG"
Bodies = list[dict[str, Any]]


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._reply(200, {"model_path": "none"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.received.append((self.headers.get("Authorization"), body))
        if REFUSED in json.dumps(body):
            self._reply(400, {"error": {"message": "too long"}})
        else:
            self._reply(200, answer_list(body))

    def _reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


def answer_list(body: dict[str, Any]) -> Any:
    """As a server answers a body whose text, sampling and ``logprob_start_len`` may be lists."""
    kind = "input_ids" if "input_ids" in body else "text"
    if not isinstance(body["sampling_params"], list):
        return answer(body)
    outputs: list[Any] = []
    for place, (prompt, sampling) in enumerate(zip(body[kind], body["sampling_params"], strict=True)):
        if body.get("return_logprob") and kind == "text":
            assert isinstance(body["logprob_start_len"][place], int)
            alone = answer(body | {"text": [prompt]})
        elif kind == "input_ids":
            alone = answer(body | {"input_ids": [prompt]})
        else:
            alone = answer(body | {"text": prompt, "sampling_params": sampling})
        outputs += alone if isinstance(alone, list) else [alone]
    return outputs


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.received = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def endpoint(server: ThreadingHTTPServer) -> Iterator[Endpoint]:
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}", api_key="secret")
    endpoint.waves._quiet_s = 1000.0
    yield endpoint
    endpoint.shutdown()
    endpoint.shutdown()


@sgl.function
def program(s: Any, text: str) -> Any:
    s += text + sgl.gen("x", max_tokens=len(text)) + sgl.select("y", ["a", "bc"])


ARGUMENTS = [{"text": f"text {number % 3} {number}"} for number in range(40)]


def test_a_wave_is_one_request_and_programs_get_what_upstream_gets(server: Any, endpoint: Endpoint) -> None:
    """Three waves: what is generated, whatever its sampling; the lengths of the prompts; what the choices are worth."""
    found = [state.text() for state in program.run_batch(ARGUMENTS, backend=endpoint)]
    assert [len(body["text"]) for _, body in server.received] == [40, 40, 80]
    assert {key for key, _ in server.received} == {"Bearer secret"}
    stock = sgl.RuntimeEndpoint(endpoint.base_url, api_key="secret")
    assert found == [state.text() for state in program.run_batch(ARGUMENTS, backend=stock)]


def test_a_prompt_that_is_refused_is_its_program_s_error_alone(endpoint: Endpoint) -> None:
    arguments = [*ARGUMENTS[:9], {"text": REFUSED}, *ARGUMENTS[9:20]]
    states = program.run_batch(arguments, backend=endpoint)
    assert [place for place, state in enumerate(states) if state.error() is not None] == [9]
    assert "too long" in str(states[9].error())


def test_a_server_that_is_gone_is_every_program_s_error(server: Any, endpoint: Endpoint) -> None:
    endpoint.base_url = "http://127.0.0.1:9"  # the discard port, where nobody listens
    states = program.run_batch(ARGUMENTS, backend=endpoint)
    assert {type(state.error()).__name__ for state in states} == {"URLError"}


_PROMPTS = st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), min_size=1, max_size=3))


@given(prompts=st.lists(_PROMPTS, min_size=2, max_size=6), num_samples=st.integers(1, 3), data=st.data())
def test_merged_bodies_are_answered_as_each_alone(prompts: list[Any], num_samples: int, data: st.DataObject) -> None:
    bodies: Bodies = []
    for prompt in prompts:
        limit = data.draw(st.integers(0, 9))
        bodies.append({"text": prompt, "sampling_params": {"max_new_tokens": limit, "n": num_samples}})

    def outputs(body: dict[str, Any]) -> list[Any]:
        each = zip(body["text"], body["sampling_params"], strict=True)
        return [(text, sampling["max_new_tokens"], sample) for text, sampling in each for sample in range(num_samples)]

    def alone(body: dict[str, Any]) -> Any:
        limit, text = body["sampling_params"]["max_new_tokens"], body["text"]
        listed = text if isinstance(text, list) else [text]
        found = [(one, limit, sample) for one in listed for sample in range(num_samples)]
        return found if isinstance(text, list) or num_samples > 1 else found[0]

    assert split(bodies, outputs(merge(bodies))) == [alone(body) for body in bodies]
