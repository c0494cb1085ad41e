"""Batches through the API, by a real client: what they go through, and what comes out."""

from __future__ import annotations

import json
import sqlite3
import time
from array import array
from collections.abc import Sequence
from contextlib import closing

import openai
import pytest
from openai.types import Batch, FileObject

from batchllm.offline.runtime import Chat, RunRequests
from batchllm.request import ChatPrompt
from tests.cli.instant_engine import ABORTED, CONTEXT_LEN, Settings
from tests.server.api_rows import (
    begin,
    check_each_row_once,
    counts_of,
    lines_of,
    row,
    rows_of,
    until,
    upload,
    wait_for,
    wait_for_rows,
)
from tests.server.conftest import Serve
from tests.server.instant_server import Api, SharedRuntime

# The good way


def test_a_batch_is_validated_run_and_completed_with_every_answer_in_input_order(api: Api) -> None:
    begun = begin(api.client, rows_of(50), metadata={"who": "me"})
    assert begun.status == "validating"
    assert (begun.metadata, counts_of(begun)) == ({"who": "me"}, (0, 0, 0))
    batch = wait_for(api.client, begun.id)
    assert batch.status == "completed"
    assert (batch.error_file_id, batch.errors, batch.model) == (None, None, "instant")
    assert [line["custom_id"] for line in lines_of(api.client, batch.output_file_id)] == [f"r{i}" for i in range(50)]
    check_each_row_once(api.client, batch, 50)


def test_an_ended_batch_is_exactly_what_openai_s_types_say(api: Api) -> None:
    """Checked without any conversion; times follow each other."""
    begun = begin(api.client, [row(0), row(1, max_tokens=-1)], completion_window="2h")
    wait_for(api.client, begun.id)
    raw = api.client.batches.with_raw_response.retrieve(begun.id).text
    batch = Batch.model_validate_json(raw, strict=True)
    assert set(json.loads(raw)) == set(Batch.model_fields)
    assert batch.expires_at == batch.created_at + 7200
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(time or 0 for time in times)
    assert batch.failed_at is batch.expired_at is batch.cancelling_at is batch.cancelled_at is None
    assert batch.usage is not None
    assert (batch.usage.input_tokens, batch.usage.output_tokens, batch.usage.total_tokens) == (3, 1, 4)
    for file_id in (batch.output_file_id, batch.error_file_id):
        assert file_id is not None
        raw = api.client.files.with_raw_response.retrieve(file_id).text
        file = FileObject.model_validate_json(raw, strict=True)
        assert (file.purpose, set(json.loads(raw))) == ("batch_output", set(FileObject.model_fields))
        assert file.bytes == len(api.client.files.content(file_id).content)


def test_rows_whose_bodies_are_wrong_fail_alone(api: Api) -> None:
    rows = [
        row(0),
        row(1, temperature="hot"),
        row(2, nonsense=1),
        row(3, prompt=[5] * 3000),
        row(4, prompt=[1, ABORTED]),
        row(5, prompt=None),
        row(6, stream=True),
        row(7),
    ]
    batch = wait_for(api.client, begin(api.client, rows).id)
    assert (batch.status, counts_of(batch)) == ("completed", (8, 2, 6))
    errors = lines_of(api.client, batch.error_file_id)
    assert [line["custom_id"] for line in errors] == [f"r{i}" for i in range(1, 7)]
    assert [line["response"]["status_code"] for line in errors] == [400, 400, 400, 500, 400, 400]
    assert [line["response"]["body"]["error"]["code"] for line in errors] == [
        *("invalid_parameter_type", "unknown_parameter", "prompt_too_long", "aborted"),
        *("missing_prompt", "unsupported_parameter"),
    ]
    check_each_row_once(api.client, batch, 8)


def test_a_batch_without_an_answer_has_an_error_file_only(api: Api) -> None:
    batch = wait_for(api.client, begin(api.client, [row(0, n=-1)]).id)
    assert (batch.status, batch.output_file_id, counts_of(batch)) == ("completed", None, (1, 0, 1))
    assert len(lines_of(api.client, batch.error_file_id)) == 1


class ChatRuntime(SharedRuntime):
    """Its tokens are characters; it keeps the limits of what is submitted."""

    def __init__(self) -> None:
        super().__init__(Settings())
        self.tokenizer = Characters()
        self.limits: list[int] = []

    def submit(self, job_id: int, requests: RunRequests) -> None:
        self.limits += requests.run.request_max_new_len.tolist()
        super().submit(job_id, requests)


class Characters:
    """What chats need of a tokenizer; a real one takes seconds to import."""

    def encode_chats(self, chats: Sequence[Chat]) -> list[ChatPrompt]:
        texts = ["".join(message["content"] for message in messages) for messages, _ in chats]
        return [ChatPrompt(ids=array("i", map(ord, text))) for text in texts]


def test_a_chat_row_without_a_limit_gets_what_the_context_leaves(serve: Serve) -> None:
    """As with OpenAI, and not the 128 tokens of `batchllm run`."""
    runtime = ChatRuntime()
    api = serve(runtime=runtime)
    line = {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions"}
    rows = [line | {"body": {"messages": [{"role": "user", "content": "hello"}]}}]
    batch = wait_for(api.client, begin(api.client, rows, endpoint="/v1/chat/completions").id)
    (answer,) = lines_of(api.client, batch.output_file_id)
    assert answer["response"]["body"]["object"] == "chat.completion"
    assert runtime.limits == [CONTEXT_LEN - len("hello")]


def test_many_batches_at_once_keep_their_rows_apart(serve: Serve) -> None:
    api = serve(engine={"batch": 7}, max_active_jobs=3)
    begun = [begin(api.client, rows_of(20 + i)) for i in range(8)]
    for i, one in enumerate(begun):
        batch = wait_for(api.client, one.id)
        assert batch.status == "completed"
        check_each_row_once(api.client, batch, 20 + i)


def test_counts_are_told_while_a_batch_runs(serve: Serve) -> None:
    api = serve(engine={"batch": 10, "stuck_after": 30})
    begun = begin(api.client, rows_of(50))
    batch = wait_for_rows(api.client, begun.id, 30)
    assert (batch.status, counts_of(batch)) == ("in_progress", (50, 30, 0))


def test_batches_beyond_the_limit_wait_in_order_of_creation(serve: Serve) -> None:
    api = serve(engine={"batch": 10, "stuck_after": 10}, max_active_jobs=1)
    first, second, third = (begin(api.client, rows_of(20)) for _ in range(3))
    wait_for_rows(api.client, first.id, 10)
    for waiting in (second, third):
        assert counts_of(wait_for(api.client, waiting.id, "in_progress")) == (20, 0, 0)
    api.client.batches.cancel(first.id)
    wait_for(api.client, first.id)
    wait_for_rows(api.client, second.id, 10)
    assert counts_of(api.client.batches.retrieve(third.id)) == (20, 0, 0)


def test_files_of_results_go_when_they_were_told_to(api: Api) -> None:
    begun = begin(api.client, [row(0)], output_expires_after={"anchor": "created_at", "seconds": 3600})
    batch = wait_for(api.client, begun.id)
    assert batch.output_file_id is not None
    file = api.client.files.retrieve(batch.output_file_id)
    assert file.expires_at == file.created_at + 3600


# Cancelled and expired


def test_a_cancelled_batch_keeps_what_it_has_and_tells_of_the_rest(serve: Serve) -> None:
    api = serve(engine={"batch": 10, "stuck_after": 30})
    begun = begin(api.client, rows_of(50))
    wait_for_rows(api.client, begun.id, 30)
    assert api.client.batches.cancel(begun.id).status == "cancelling"
    batch = wait_for(api.client, begun.id)
    assert (batch.status, counts_of(batch)) == ("cancelled", (50, 30, 20))
    assert batch.cancelling_at is not None
    assert batch.cancelled_at is not None
    check_each_row_once(api.client, batch, 50)
    for line in lines_of(api.client, batch.error_file_id):
        assert (line["response"], line["error"]["code"]) == (None, "batch_cancelled")


def test_cancelling_again_changes_nothing_and_what_has_ended_cannot_be_cancelled(serve: Serve) -> None:
    api = serve(engine={"batch": 1, "stuck_after": 1}, grace_s=1.0)
    begun = begin(api.client, rows_of(5))
    wait_for_rows(api.client, begun.id, 1)
    first, again = api.client.batches.cancel(begun.id), api.client.batches.cancel(begun.id)
    assert (again.status, again.cancelling_at) == ("cancelling", first.cancelling_at)
    assert wait_for(api.client, begun.id).status == "cancelled"
    with pytest.raises(openai.ConflictError, match="cancelled"):
        api.client.batches.cancel(begun.id)
    failed = wait_for(api.client, begin(api.client, b"").id)
    with pytest.raises(openai.ConflictError, match="failed"):
        api.client.batches.cancel(failed.id)


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_batch_that_waits_for_its_turn_ends_without_it(serve: Serve, end: str) -> None:
    """Every place is taken, by a batch that goes on for ever."""
    api = serve(engine={"batch": 1, "stuck_after": 1}, max_active_jobs=1)
    first = begin(api.client, rows_of(5))
    wait_for_rows(api.client, first.id, 1)
    second = begin(api.client, rows_of(5))
    wait_for(api.client, second.id, "in_progress")
    if end == "cancelled":
        api.client.batches.cancel(second.id)
    else:
        with closing(sqlite3.connect(api.storage / "batches.db")) as db, db:
            db.execute("UPDATE batch SET expires_at = created_at WHERE id = ?", (second.id,))
    batch = wait_for(api.client, second.id)
    assert (batch.status, counts_of(batch)) == (end, (5, 0, 5))
    assert api.client.batches.retrieve(first.id).status == "in_progress"


def test_a_batch_that_takes_too_long_expires_with_what_it_has(serve: Serve) -> None:
    api = serve(engine={"batch": 10, "stuck_after": 30})
    begun = begin(api.client, rows_of(50))
    wait_for_rows(api.client, begun.id, 30)
    with closing(sqlite3.connect(api.storage / "batches.db")) as db, db:
        db.execute("UPDATE batch SET expires_at = created_at")
    batch = wait_for(api.client, begun.id)
    assert (batch.status, counts_of(batch)) == ("expired", (50, 30, 20))
    assert batch.expired_at is not None
    check_each_row_once(api.client, batch, 50)
    for line in lines_of(api.client, batch.error_file_id):
        assert (line["response"], line["error"]["code"]) == (None, "batch_expired")


# What a running batch needs


def test_a_batch_whose_time_is_over_before_it_ran_expires_too(serve: Serve) -> None:
    """While its file is looked at: without files. While it waits for its turn: with every row's error."""
    api = serve(engine={"batch": 1, "stuck_after": 1}, max_active_jobs=1)
    first = begin(api.client, rows_of(5))
    wait_for_rows(api.client, first.id, 1)
    second = begin(api.client, rows_of(5))
    wait_for(api.client, second.id, "in_progress")
    api.stop()
    with closing(sqlite3.connect(api.storage / "batches.db")) as db, db:
        db.execute("UPDATE batch SET expires_at = created_at")
        db.execute("UPDATE batch SET status = 'validating', in_progress_at = NULL WHERE id = ?", (first.id,))
    api = serve()
    for one, num_failed in ((first, 0), (second, 5)):
        batch = wait_for(api.client, one.id)
        assert (batch.status, len(lines_of(api.client, batch.error_file_id))) == ("expired", num_failed)


def test_the_input_of_a_batch_that_has_not_ended_cannot_be_deleted(serve: Serve) -> None:
    api = serve(engine={"batch": 10, "stuck_after": 10})
    begun = begin(api.client, rows_of(20))
    wait_for_rows(api.client, begun.id, 10)
    with pytest.raises(openai.ConflictError):
        api.client.files.delete(begun.input_file_id)
    api.client.batches.cancel(begun.id)
    wait_for(api.client, begun.id)
    assert api.client.files.delete(begun.input_file_id).deleted


def test_an_input_that_expires_under_its_batch_stays_until_the_batch_has_ended(serve: Serve) -> None:
    api = serve(engine={"batch": 10, "stuck_after": 10})
    begun = begin(api.client, rows_of(20))
    wait_for_rows(api.client, begun.id, 10)
    with closing(sqlite3.connect(api.storage / "batches.db")) as db, db:
        db.execute("UPDATE file SET expires_at = ?", (int(time.time()) - 1,))
    with pytest.raises(openai.NotFoundError):
        api.client.files.retrieve(begun.input_file_id)
    api.stop()
    assert (api.storage / "files" / begun.input_file_id).exists()
    api = serve()
    batch = wait_for(api.client, begun.id)
    check_each_row_once(api.client, batch, 20)
    api.stop()
    api = serve()
    wait_for(api.client, begin(api.client, [row(0)]).id)  # it has looked around
    assert not (api.storage / "files" / begun.input_file_id).exists()


def test_batches_that_do_not_fit_in_memory_together_are_planned_in_parts_and_answered(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Their token ids share one limit; what one batch does not get costs it no answer, and is free in the end."""
    caplog.set_level("INFO", "batchllm.server.batch_run")
    limit = 32 << 10
    api = serve(engine={"batch": 100}, max_token_bytes=limit, max_active_jobs=8)
    assert api.service._dispatcher is not None
    memory = api.service._dispatcher._context.token_memory
    input_ids = [upload(api.client, rows_of(900)) for _ in range(4)]
    asked = {"endpoint": "/v1/completions", "completion_window": "24h"}
    begun = [api.client.batches.create(input_file_id=file_id, **asked) for file_id in input_ids]
    for batch in [wait_for(api.client, one.id) for one in begun]:
        assert batch.status == "completed"
        check_each_row_once(api.client, batch, 900)
    assert 900 * 3 * 4 <= memory.peak_bytes <= limit // 2
    until(lambda: memory.num_bytes == 0, "memory is not given back")
    told = [record.getMessage() for record in caplog.records if "planned in" in record.getMessage()]
    assert told and all("--batch-max-token-bytes" in message for message in told)
