"""Requests for batches that are refused, files that are no batch, lists, and the same request again."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.api_rows import (
    COMPLETIONS,
    begin,
    lines_of,
    row,
    rows_of,
    upload,
    wait_for,
    wait_for_rows,
)
from tests.server.conftest import Serve
from tests.server.instant_server import Api

# Files that are no batch


def _errors_of(api: Api, rows: Any, **more: Any) -> list[tuple[str | None, int | None]]:
    batch = wait_for(api.client, begin(api.client, rows, **more).id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.object == "list"
    assert batch.errors.data is not None
    assert all(error.message for error in batch.errors.data)
    return [(error.code, error.line) for error in batch.errors.data]


def test_a_file_with_bad_lines_fails_as_a_whole_and_names_each(api: Api) -> None:
    rows = [
        row(0),
        "{not json",
        '["a list"]',
        "",
        {k: v for k, v in row(1).items() if k != "custom_id"},
        row(2) | {"custom_id": 7},
        row(3) | {"method": "GET"},
        row(4) | {"url": "/v1/chat/completions"},
        row(5) | {"url": "/v1/moderations"},
        row(6) | {"body": "text"},
        row(0),
        row(7) | {"extra": 1},
        row(8) | {"custom_id": ""},
        '{"custom_id": "\\ud800"}',
    ]
    assert _errors_of(api, rows) == [
        ("invalid_json", 2),
        ("not_an_object", 3),
        ("missing_id", 5),
        ("invalid_id", 6),
        ("invalid_method", 7),
        ("invalid_url", 8),
        ("invalid_url", 9),
        ("invalid_body", 10),
        ("duplicate_id", 11),
        ("unknown_field", 12),
        ("invalid_id", 13),
        ("lone_surrogate", 14),
    ]


@pytest.mark.parametrize("data", [b"", b"\n\n \n"])
def test_a_file_without_rows_fails(api: Api, data: bytes) -> None:
    assert _errors_of(api, data) == [("empty_file", None)]


@pytest.mark.parametrize(
    ("data", "code", "line"),
    [
        (b"\x1f\x8b\x08\x00rubbish", "invalid_file", None),
        (b"PAR1rubbish", "unsupported_format", None),
        (b"\xff\xfe", "empty_file", None),
        (b"[" * 100_000, "nested_too_deep", 1),
    ],
)
def test_a_file_that_is_no_json_lines_fails_with_one_error(api: Api, data: bytes, code: str, line: int | None) -> None:
    assert _errors_of(api, data) == [(code, line)]


def test_a_file_with_too_many_rows_fails(serve: Serve) -> None:
    api = serve(max_rows=10)
    assert _errors_of(api, rows_of(11)) == [("too_many_rows", 11)]
    assert wait_for(api.client, begin(api.client, rows_of(10)).id).status == "completed"


def test_of_very_many_errors_the_first_are_told_and_how_many_more_there_are(api: Api) -> None:
    rows = [row(0)] * 500
    found = _errors_of(api, rows)
    assert found == [("duplicate_id", i) for i in range(2, 102)] + [("more_errors", None)]


# Requests that are refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"endpoint": None}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "999999999d"}, "completion_window"),
        ({"completion_window": "2٤h"}, "completion_window"),
        ({"input_file_id": 7}, "input_file_id"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": []}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 10}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 10**30}}, "output_expires_after.seconds"),
        ({"output_expires_after": {"seconds": 3600}}, "output_expires_after.anchor"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_parameter_is_named(api: Api, body: dict[str, Any], param: str) -> None:
    good = {"input_file_id": "file-" + "0" * 32, "endpoint": COMPLETIONS, "completion_window": "24h"}
    answer = httpx.post(f"{api.url}/v1/batches", json=good | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"null", 400),
        (b"[]", 400),
        (b"\xff", 400),
        (b'{"metadata":' * 50_000, 413),
        (b'{"metadata":' * 10_000, 400),
        (b'{"input_file_id": "\\ud800"}', 400),
        (b" " * 300_000, 413),
        (b'{"input_file_id": "\\u0000", "endpoint": "/v1/completions", "completion_window": "1h"}', 404),
    ],
)
def test_a_body_that_is_no_batch_is_refused(api: Api, body: bytes, status: int) -> None:
    answer = httpx.post(f"{api.url}/v1/batches", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_of_another_type_is_refused(api: Api) -> None:
    assert httpx.post(f"{api.url}/v1/batches", data={"a": "b"}).status_code == 415


def test_a_batch_of_a_file_that_is_not_there_or_not_for_batches_is_refused(api: Api) -> None:
    with pytest.raises(openai.NotFoundError):
        api.client.batches.create(input_file_id="file-none", endpoint="/v1/completions", completion_window="24h")
    done = wait_for(api.client, begin(api.client, [row(0)]).id)
    assert done.output_file_id is not None
    with pytest.raises(openai.BadRequestError, match="batch_output"):
        api.client.batches.create(
            input_file_id=done.output_file_id, endpoint="/v1/completions", completion_window="24h"
        )


@pytest.mark.parametrize("batch_id", ["batch_", "batch_" + "0" * 32, "%00", "..%2f..%2fetc", "x" * 1000])
def test_a_batch_that_is_not_there_is_not_found(api: Api, batch_id: str) -> None:
    for answer in (
        httpx.get(f"{api.url}/v1/batches/{batch_id}"),
        httpx.post(f"{api.url}/v1/batches/{batch_id}/cancel"),
    ):
        assert answer.status_code == 404


def test_before_the_engine_is_up_every_route_says_so(serve: Serve) -> None:
    api = serve(is_started=False)
    with pytest.raises(openai.InternalServerError) as caught:
        api.client.batches.list()
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
    with pytest.raises(openai.InternalServerError):
        upload(api.client, [row(0)])


# Lists


def test_batches_are_listed_newest_first_page_by_page(serve: Serve) -> None:
    api = serve()
    begun = [begin(api.client, [row(0)]).id for _ in range(7)]
    assert [batch.id for batch in api.client.batches.list(limit=3)] == begun[::-1]
    page = httpx.get(f"{api.url}/v1/batches", params={"limit": 3}).json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (begun[6], begun[4], True)
    page = httpx.get(f"{api.url}/v1/batches", params={"limit": 4, "after": begun[4]}).json()
    assert [batch["id"] for batch in page["data"]] == begun[3::-1]
    assert page["has_more"] is False


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=x", "limit=" + "9" * 5000, "after=" + "x" * 65])
def test_a_wrong_page_is_refused(api: Api, query: str) -> None:
    answer = httpx.get(f"{api.url}/v1/batches?{query}")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


# The same request again


def test_a_request_sent_again_with_its_key_gives_the_same_batch(api: Api) -> None:
    file_id = upload(api.client, [row(0)])

    def create(key: str, window: Any = "24h") -> str:
        return api.client.batches.create(
            input_file_id=file_id,
            endpoint="/v1/completions",
            completion_window=window,
            extra_headers={"Idempotency-Key": key},
        ).id

    first = create("a")
    assert create("a") == first
    assert create("b") != first
    with pytest.raises(openai.ConflictError):
        create("a", "1h")
    assert wait_for(api.client, first).status == "completed"
    assert create("a") == first
    assert len([batch for batch in api.client.batches.list() if batch.input_file_id == file_id]) == 2


@pytest.mark.parametrize(
    ("body", "what"), [(b"[]", "an array"), (b"null", "null"), (b"3", "a value"), (b'"x"', "a value")]
)
def test_a_body_that_is_no_object_is_named(api: Api, body: bytes, what: str) -> None:
    answer = httpx.post(f"{api.url}/v1/batches", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"the body must be an object, not {what}"


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/files", "/v1/batches", "/v1/files/file-1", "/v1/batches/batch_1"])
def test_pages_of_other_origins_may_not_use_what_is_stored(api: Api, method: str, path: str) -> None:
    """SGLang's server lets any page ask; a page of this host, and a program, may."""
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://[", "http://[x]"):
        answer = httpx.request(method, f"{api.url}{path}", headers={"Origin": origin})
        assert answer.status_code in (403, 405), answer.text
    for headers in ({}, {"Origin": api.url}):
        assert httpx.request(method, f"{api.url}{path}", headers=headers).status_code != 403


def test_an_ended_batch_can_be_deleted_and_its_results_stay(serve: Serve) -> None:
    api = serve(engine={"batch": 1, "stuck_after": 1})
    first = begin(api.client, rows_of(5))
    wait_for_rows(api.client, first.id, 1)
    api.client.batches.cancel(first.id)
    ended = wait_for(api.client, first.id)
    running = begin(api.client, rows_of(5))
    wait_for(api.client, running.id, "in_progress")
    assert httpx.delete(f"{api.url}/v1/batches/{running.id}").status_code == 409
    answer = httpx.delete(f"{api.url}/v1/batches/{ended.id}")
    assert answer.json() == {"id": ended.id, "object": "batch", "deleted": True}
    assert httpx.delete(f"{api.url}/v1/batches/{ended.id}").status_code == 404
    assert [batch.id for batch in api.client.batches.list()] == [running.id]
    assert len(lines_of(api.client, ended.output_file_id)) == 1
