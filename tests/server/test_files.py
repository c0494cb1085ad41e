"""Files through the API: up, listed, down and gone; and every way in which an upload can be wrong."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import FileDeleted, FileObject

from batchllm.errors import ConfigError
from batchllm.server import BatchOptions, BatchService
from tests.server.api_rows import begin, jsonl, row, rows_of, until, upload, wait_for
from tests.server.conftest import Serve
from tests.server.instant_server import Api
from tests.sizes import sized

BOUNDARY = "gulf"
FORM = f"multipart/form-data; boundary={BOUNDARY}"
NUM_UPLOADS = sized(80, 200)  # more than the server has threads


def _part(name: str, content: bytes, filename: str | None = None) -> bytes:
    filename = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'
    return head.encode() + content + b"\r\n"


PURPOSE, FILE, LAST = _part("purpose", b"batch"), _part("file", b"{}", "f"), f"--{BOUNDARY}--\r\n".encode()


def _post(api: Api, body: Any, content_type: str = FORM, **headers: str) -> httpx.Response:
    return httpx.post(f"{api.url}/v1/files", content=body, headers={"content-type": content_type} | headers)


def _leftovers(api: Api) -> list[str]:
    """Bytes in the storage that no file has."""
    with closing(sqlite3.connect(api.storage / "batches.db")) as db:
        known = {file_id for (file_id,) in db.execute("SELECT id FROM file")}
    names = [*os.listdir(api.storage / "files"), *os.listdir(api.storage / "incoming")]
    return [name for name in names if name not in known]


def test_a_file_comes_back_as_it_went_up(api: Api) -> None:
    data = os.urandom(3_000_000)
    raw = api.client.files.with_raw_response.create(file=("größe \u200f.bin", data), purpose="batch").text
    file = FileObject.model_validate_json(raw, strict=True)
    assert set(json.loads(raw)) == set(FileObject.model_fields)
    assert (file.bytes, file.filename, file.purpose, file.expires_at) == (len(data), "größe \u200f.bin", "batch", None)
    assert api.client.files.retrieve(file.id) == file
    answer = httpx.get(f"{api.url}/v1/files/{file.id}/content")
    assert (answer.content, answer.headers["content-length"]) == (data, str(len(data)))
    raw = api.client.files.with_raw_response.delete(file.id).text
    assert FileDeleted.model_validate_json(raw, strict=True) == FileDeleted(id=file.id, deleted=True, object="file")
    for ask in (api.client.files.retrieve, api.client.files.content, api.client.files.delete):
        with pytest.raises(openai.NotFoundError):
            ask(file.id)
    assert not _leftovers(api)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a\\..\\b", ".", "", "nul\x01", "x" * 1024, "'; --"]
)
def test_a_name_is_a_name_and_never_a_path(api: Api, name: str) -> None:
    before = {path for path in api.storage.rglob("*") if path.parent != api.storage / "files"}
    file = _post(api, _part("file", b"data", name) + PURPOSE + LAST).json()
    assert file["filename"] == name
    assert (api.storage / "files" / file["id"]).read_bytes() == b"data"
    assert {path for path in api.storage.rglob("*") if path.parent != api.storage / "files"} == before


def test_ids_cannot_be_guessed(api: Api) -> None:
    ids = {upload(api.client, [row(0)]) for _ in range(20)}
    assert len(ids) == 20
    assert all(len(file_id.removeprefix("file-")) == 32 for file_id in ids)


@pytest.mark.parametrize("file_id", ["x", "file-" + "0" * 32, "%2e%2e%2fbatches.db", "..", "%00", "y" * 5000])
def test_a_file_that_is_not_there_is_not_found(api: Api, file_id: str) -> None:
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        assert httpx.request(method, f"{api.url}/v1/files/{file_id}{path}").status_code in (404, 405)


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (PURPOSE + FILE + LAST, "application/json", 415),
        (PURPOSE + FILE + LAST, "multipart/form-data", 400),
        (PURPOSE + FILE + LAST, f"multipart/form-data; boundary={'x' * 500}", 400),
        (PURPOSE + FILE, FORM, 400),
        (b"", FORM, 400),
        (b"\x00" * 100, FORM, 400),
        (LAST, FORM, 400),
        (FILE + LAST, FORM, 400),
        (PURPOSE + LAST, FORM, 400),
        (PURPOSE + _part("file", b"{}") + LAST, FORM, 400),
        (PURPOSE + FILE + FILE + LAST, FORM, 400),
        (PURPOSE + PURPOSE + FILE + LAST, FORM, 400),
        (_part("purpose", b"fine-tune") + FILE + LAST, FORM, 400),
        (_part("purpose", b"b" * 5000) + FILE + LAST, FORM, 400),
        (PURPOSE + _part("more", b"") + FILE + LAST, FORM, 400),
        (PURPOSE + _part("file", b"", "x" * 1025) + LAST, FORM, 400),
        (_part("p", b"") * 20 + LAST, FORM, 400),
        (b"--gulf\r\n" + b"A: b\r\n" * 100 + b"\r\n\r\n" + LAST, FORM, 400),
        (b"--gulf\r\nA: " + b"b" * 100_000 + b"\r\n\r\n\r\n" + LAST, FORM, 400),
        (PURPOSE + _part("expires_after[seconds]", b"3600") + FILE + LAST, FORM, 400),
        (PURPOSE + _part("expires_after[anchor]", b"created_at") + FILE + LAST, FORM, 400),
        *(
            (
                PURPOSE
                + _part("expires_after[anchor]", b"created_at")
                + _part("expires_after[seconds]", seconds)
                + FILE
                + LAST,
                FORM,
                400,
            )
            for seconds in (b"1", b"-3600", b"9" * 4000, b"3e3", "٣٦٠٠".encode(), b"\xff")
        ),
    ],
)
def test_a_form_that_is_none_is_refused_and_leaves_nothing(
    api: Api, body: bytes, content_type: str, status: int
) -> None:
    answer = _post(api, body, content_type)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert not _leftovers(api)


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_a_key_that_is_none_is_refused(api: Api, key: str) -> None:
    assert _post(api, PURPOSE + FILE + LAST, **{"Idempotency-Key": key}).status_code == 400


def test_a_file_that_is_too_large_is_refused_with_and_without_a_length(serve: Serve) -> None:
    api = serve(max_file_bytes=100_000)
    assert api.client.files.create(file=("f", b"x" * 100_000), purpose="batch").bytes == 100_000
    with pytest.raises(openai.APIStatusError) as caught:
        api.client.files.create(file=("f", b"x" * 5_000_000), purpose="batch")
    assert (caught.value.status_code, caught.value.code) == (413, "file_too_large")

    def pieces() -> Iterator[bytes]:
        yield PURPOSE + _part("file", b"", "f").removesuffix(b"\r\n")
        for _ in range(200):
            yield b"x" * 10_000
        yield b"\r\n" + LAST

    assert _post(api, pieces()).status_code == 413
    assert not _leftovers(api)


def test_a_client_that_goes_in_the_middle_leaves_nothing(api: Api) -> None:
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: 9000000\r\n\r\n"
        connection.sendall(head.encode() + _part("file", b"x" * 1_000_000, "f"))
        until(lambda: bool(_leftovers(api)), "nothing arrives")
    until(lambda: not _leftovers(api), "something stays")


def test_clients_that_are_slow_hold_up_nobody(api: Api) -> None:
    """More of them than the server has threads, with half a request each, and downloads that nobody reads."""
    file_id = upload(api.client, b"x" * 20_000_000)
    slow = [socket.create_connection(("127.0.0.1", api.port)) for _ in range(100)]
    try:
        for i, connection in enumerate(slow):
            if i % 2:
                connection.sendall(f"GET /v1/files/{file_id}/content HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            else:
                head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: 9000000\r\n\r\n"
                connection.sendall(head.encode() + PURPOSE)
        assert wait_for(api.client, begin(api.client, rows_of(5)).id).status == "completed"
    finally:
        for connection in slow:
            connection.close()


def test_more_uploads_at_once_than_there_are_threads_all_arrive(api: Api) -> None:
    async def send(client: openai.AsyncOpenAI, number: int) -> str:
        data = jsonl(rows_of(200, first=number))
        return (await client.files.create(file=(f"{number}.jsonl", data), purpose="batch")).id

    async def send_all() -> list[str]:
        limits = httpx.Limits(max_connections=NUM_UPLOADS)
        async with openai.AsyncOpenAI(
            base_url=f"{api.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.AsyncClient(limits=limits, timeout=60),
        ) as client:
            return await asyncio.gather(*(send(client, number) for number in range(NUM_UPLOADS)))

    ids = asyncio.run(send_all())
    assert len(set(ids)) == NUM_UPLOADS
    for number, file_id in enumerate(ids):
        assert (api.storage / "files" / file_id).read_bytes() == jsonl(rows_of(200, first=number))
    assert not _leftovers(api)


def test_the_same_upload_sent_again_with_its_key_is_the_same_file(api: Api) -> None:
    key = {"Idempotency-Key": "up"}
    first = upload(api.client, [row(0)], extra_headers=key)
    assert upload(api.client, [row(0)], extra_headers=key) == first
    assert upload(api.client, [row(0)]) != first
    with pytest.raises(openai.ConflictError):
        upload(api.client, [row(1)], extra_headers=key)
    api.client.files.delete(first)
    second = upload(api.client, [row(1)], extra_headers=key)
    with closing(sqlite3.connect(api.storage / "batches.db")) as db, db:
        db.execute("UPDATE file SET expires_at = 1 WHERE id = ?", (second,))
    third = upload(api.client, [row(1)], extra_headers=key)
    assert len({first, second, third}) == 3
    assert not _leftovers(api)


def test_uploads_with_one_key_at_the_same_time_make_one_file(api: Api) -> None:
    async def send_all() -> list[Any]:
        async with httpx.AsyncClient() as client:
            headers = {"content-type": FORM, "Idempotency-Key": "race"}
            body = PURPOSE + FILE + LAST
            posts = [client.post(f"{api.url}/v1/files", content=body, headers=headers) for _ in range(10)]
            return [answer.json() for answer in await asyncio.gather(*posts)]

    found = asyncio.run(send_all())
    assert len({file["id"] for file in found}) == 1
    assert not _leftovers(api)


def test_files_are_listed_by_age_purpose_and_page(serve: Serve) -> None:
    api = serve()
    ids = [upload(api.client, [row(i)]) for i in range(5)]
    assert [file.id for file in api.client.files.list(limit=2)] == ids[::-1]
    assert [file.id for file in api.client.files.list(order="asc", limit=2)] == ids
    page = httpx.get(f"{api.url}/v1/files", params={"limit": 2, "after": ids[3]}).json()
    assert [file["id"] for file in page["data"]] == [ids[2], ids[1]]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[2], ids[1], True)
    done = wait_for(api.client, begin(api.client, [row(0)]).id)
    assert [file.id for file in api.client.files.list(purpose="batch_output")] == [done.output_file_id]
    assert api.client.files.list(purpose="vision").data == []


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "order=up", "limit=%ff", "purpose=" + "p" * 99])
def test_a_wrong_page_is_refused(api: Api, query: str) -> None:
    answer = httpx.get(f"{api.url}/v1/files?{query}")
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_page_after_nothing_is_not_found(api: Api) -> None:
    for path in ("files", "batches"):
        for after in ("x", "", "%00"):
            assert httpx.get(f"{api.url}/v1/{path}?after={after}").status_code == 404


def test_a_file_that_has_expired_is_gone_and_its_bytes_go(serve: Serve) -> None:
    api = serve()
    more = {"expires_after": {"anchor": "created_at", "seconds": 3600}}
    file = api.client.files.create(file=("f", b"data"), purpose="batch", **more)
    assert file.expires_at == file.created_at + 3600
    with closing(sqlite3.connect(api.storage / "batches.db")) as db, db:
        db.execute("UPDATE file SET expires_at = 1")
    with pytest.raises(openai.NotFoundError):
        api.client.files.retrieve(file.id)
    assert api.client.files.list().data == []
    api.stop()
    api = serve()
    until(lambda: not (api.storage / "files" / file.id).exists(), "its bytes stay")


def test_what_a_killed_server_has_left_behind_is_swept_away(serve: Serve) -> None:
    api = serve()
    kept = upload(api.client, [row(0)])
    api.stop()
    names = ["file-" + "1" * 32, "batch_" + "1" * 32]
    (api.storage / "files" / names[0]).write_bytes(b"renamed, not committed")
    (api.storage / "incoming" / "unfinished-x").write_bytes(b"half")
    (api.storage / "jobs" / names[1]).mkdir()
    api = serve()
    assert api.client.files.content(kept).content == jsonl([row(0)])
    assert not _leftovers(api)
    wait_for(api.client, begin(api.client, [row(0)]).id)
    assert not (api.storage / "jobs" / names[1]).exists()
    # The records may be what is missing: an older copy of the database, say.
    assert sorted(os.listdir(api.storage / "unknown")) == sorted(names)
    api.stop()
    old = time.time() - 8 * 24 * 3600
    for name in names:
        os.utime(api.storage / "unknown" / name, (old, old))
    (api.storage / "unknown" / "mine").write_bytes(b"somebody's")
    os.utime(api.storage / "unknown" / "mine", (old, old))
    serve()
    assert os.listdir(api.storage / "unknown") == ["mine"]


def test_what_is_not_a_server_s_is_neither_deleted_nor_moved(serve: Serve) -> None:
    """Whatever folder of the storage it is in."""
    api = serve()
    api.stop()
    paths = [api.storage / folder / "thesis.txt" for folder in ("files", "incoming", "jobs")]
    for path in paths:
        path.write_bytes(b"mine")
    (api.storage / "jobs" / "train-run-7").mkdir()
    (api.storage / "jobs" / "train-run-7" / "weights").write_bytes(b"mine")
    api = serve()
    wait_for(api.client, begin(api.client, [row(0)]).id)
    assert [path.read_bytes() for path in paths] == [b"mine"] * 3
    assert (api.storage / "jobs" / "train-run-7" / "weights").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["thesis.txt", "files/thesis.txt", "jobs/train-run-7/weights", ".hidden"])
def test_a_folder_that_holds_something_else_is_no_storage(tmp_path: Path, name: str) -> None:
    path = tmp_path / "s" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=f"--batch-storage .*: holds {name.partition('/')[0]} and no batches.db"):
        BatchService(BatchOptions(storage=tmp_path / "s"))
    assert sorted(p for p in (tmp_path / "s").rglob("*") if p.is_file()) == [path]
    assert path.read_bytes() == b"mine"


def test_a_database_of_something_else_is_left_as_it_is(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "batches.db")) as db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(ConfigError, match="is a database of something else"):
        BatchService(BatchOptions(storage=tmp_path))
    with closing(sqlite3.connect(tmp_path / "batches.db")) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]


@pytest.mark.parametrize("fault", ["a page", "the tables"])
def test_a_database_that_is_damaged_is_refused_at_the_start(tmp_path: Path, fault: str) -> None:
    """Not by each request and each batch."""
    BatchService(BatchOptions(storage=tmp_path)).close()
    path = tmp_path / "batches.db"
    if fault == "a page":
        with path.open("r+b") as file:
            file.seek(5 * 4096)
            file.write(b"x" * 4096)
    else:
        with closing(sqlite3.connect(path)) as db:
            db.execute("ALTER TABLE batch RENAME COLUMN usage TO used")
    with pytest.raises(
        ConfigError, match=r"--batch-storage: .*batches\.db is (damaged: .*|a database of something else)"
    ):
        BatchService(BatchOptions(storage=tmp_path))


def test_a_storage_has_one_server_at_a_time(tmp_path: Path) -> None:
    service = BatchService(BatchOptions(storage=tmp_path / "s"))
    with pytest.raises(ConfigError, match=f"--batch-storage: .*{os.getpid()}"):
        BatchService(BatchOptions(storage=tmp_path / "s"))
    service.close()
    BatchService(BatchOptions(storage=tmp_path / "s")).close()


def test_a_storage_that_cannot_be_is_a_wrong_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--batch-storage"):
        BatchService(BatchOptions(storage=tmp_path / "file"))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "batches.db").write_bytes(b"something else" * 100)
    with pytest.raises(ConfigError, match=r"batches\.db"):
        BatchService(BatchOptions(storage=tmp_path / "s"))


def test_an_upload_that_stands_still_is_cut_off(serve: Serve) -> None:
    api = serve(upload_idle_s=0.3)
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: 9000000\r\n\r\n"
        connection.sendall(head.encode() + _part("file", b"x" * 1000, "f"))
        connection.settimeout(20)
        assert b" 408 " in connection.recv(1000)
    until(lambda: not _leftovers(api), "something stays")


def test_an_upload_that_only_drips_is_cut_off_too(serve: Serve) -> None:
    """It would keep a place from others for ever, since it never stands still."""
    api = serve(upload_idle_s=0.3)
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: 9000000\r\n\r\n"
        connection.sendall(head.encode() + _part("file", b"x" * 100, "f").removesuffix(b"\r\n"))
        connection.settimeout(0.05)
        answer = b""
        for _ in range(400):
            connection.sendall(b"x")
            with suppress(TimeoutError):
                answer = connection.recv(1000)
                break
        assert b" 408 " in answer
    until(lambda: not _leftovers(api), "something stays")


def test_what_comes_behind_the_last_part_is_bounded_like_a_file(serve: Serve) -> None:
    api = serve(max_file_bytes=10_000)

    def pieces() -> Iterator[bytes]:
        yield PURPOSE + FILE + LAST
        for _ in range(200):
            yield b"x" * 10_000

    assert _post(api, pieces()).status_code == 413
    assert not _leftovers(api)


def test_files_that_come_at_once_do_not_exceed_the_storage_together(serve: Serve) -> None:
    """Each alone would fit: what has come of the others counts."""
    api = serve(storage_limit=1_000_000)
    with socket.create_connection(("127.0.0.1", api.port)) as connection:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: 900000\r\n\r\n"
        connection.sendall(head.encode() + _part("file", b"x" * 700_000, "f").removesuffix(b"\r\n"))

        def num_written() -> int:
            return sum(path.stat().st_size for path in (api.storage / "incoming").iterdir())

        until(lambda: num_written() > 400_000, "nothing is written")
        answer = _post(api, PURPOSE + _part("file", b"y" * 700_000, "g") + LAST)
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
    until(lambda: not _leftovers(api), "something stays")
    assert _post(api, PURPOSE + _part("file", b"y" * 700_000, "g") + LAST).status_code == 200


def test_more_uploads_than_may_be_open_are_asked_to_come_again(serve: Serve) -> None:
    api = serve(max_open_uploads=2)
    slow = [socket.create_connection(("127.0.0.1", api.port)) for _ in range(2)]
    try:
        head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: {FORM}\r\nContent-Length: 9000000\r\n\r\n"
        for connection in slow:
            connection.sendall(head.encode())
        until(lambda: len(_leftovers(api)) == 2, "nothing arrives")
        answer = _post(api, PURPOSE + FILE + LAST)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "too_many_uploads")
    finally:
        for connection in slow:
            connection.close()
    until(lambda: _post(api, PURPOSE + FILE + LAST).status_code == 200, "a place stays taken")


def test_what_is_stored_has_a_limit_and_deleting_makes_room(serve: Serve) -> None:
    api = serve(storage_limit=10_000)
    first = upload(api.client, b"x" * 9_000)
    with pytest.raises(openai.APIStatusError) as caught:
        api.client.with_options(max_retries=0).files.create(file=("f", b"x" * 2_000), purpose="batch")
    assert (caught.value.status_code, caught.value.code) == (507, "storage_full")
    api.client.files.delete(first)
    upload(api.client, b"x" * 2_000)
    assert not _leftovers(api)
