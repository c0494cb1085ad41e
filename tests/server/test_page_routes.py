"""Claims about the page over HTTP: who is answered, what a form may do, what an answer allows the browser."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import httpx
import pytest

from batchllm.server.batch_routes import _MAX_PAGE
from tests.server.api_rows import COMPLETIONS, begin, jsonl, lines_of, row, rows_of, upload, wait_for
from tests.server.conftest import Serve
from tests.server.instant_server import Api

KEY = "sk-page"
FORM = {"endpoint": COMPLETIONS, "completion_window": "24h"}


def browser(api: Api) -> httpx.Client:
    """Sends what a browser does from the page itself."""
    return httpx.Client(base_url=api.url, headers={"Origin": api.url, "Sec-Fetch-Site": "same-origin"})


@pytest.fixture
def locked(serve: Serve) -> Api:
    return serve(page_key=KEY)


def posts(api: Api) -> list[tuple[str, dict[str, str]]]:
    """Every form of the page that changes something, with what it needs to do so."""
    file_id = upload(api.client, rows_of(3))
    batch = begin(api.client, rows_of(3))
    return [
        ("/batch/batches", FORM | {"input_file_id": file_id}),
        (f"/batch/{batch.id}/cancel", {}),
        ("/batch/files", {"purpose": "batch"}),
        ("/batch/sign-out", {}),
    ]


def test_nothing_is_shown_or_done_without_signing_in(locked: Api) -> None:
    """Not a batch, a file, or whether there is one."""
    batch = wait_for(locked.client, begin(locked.client, rows_of(3)).id)
    with browser(locked) as client:
        signs = [client.get("/batch"), client.get(f"/batch/{batch.id}"), client.get("/batch/batch_no")]
        signs.append(client.get(f"/batch/files/{batch.output_file_id}"))
        signs += [client.post(path, data=data) for path, data in posts(locked)]
    num_batches = len(locked.client.batches.list().data)
    assert num_batches == 2  # those that were begun through the API
    for answer in signs:
        assert answer.status_code == 401 and 'name="key"' in answer.text and "set-cookie" not in answer.headers
        assert not re.search(r"batch_[0-9a-f]|file-[0-9a-f]", answer.text)


def test_the_key_gives_a_cookie_that_scripts_and_other_sites_do_not_get(locked: Api) -> None:
    with browser(locked) as client:
        refused = client.post("/batch/sign-in", data={"key": "sk-other"})
        assert refused.status_code == 401 and "set-cookie" not in refused.headers
        answer = client.post("/batch/sign-in", data={"key": KEY})
        assert (answer.status_code, answer.headers["location"]) == (303, "/batch")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/batch" in cookie
        assert KEY not in cookie
        assert client.get("/batch").status_code == 200
        assert client.post("/batch/sign-out").status_code == 303
        assert client.get("/batch").status_code == 401


def test_forms_of_other_pages_change_nothing(locked: Api) -> None:
    """Not even with the cookie: another page's origin, none, one that is hidden, or what the browser says of it."""
    forms = posts(locked)
    before = locked.client.batches.list().data
    with browser(locked) as client:
        assert client.post("/batch/sign-in", data={"key": KEY}).status_code == 303
        others = [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": locked.url.replace("127.0.0.1", "localhost")},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ]
        for headers in others:
            for path, data in [*forms, ("/batch/sign-in", {"key": KEY})]:
                answer = client.post(path, data=data, headers=headers)
                assert answer.status_code == 403, (path, headers)
        del client.headers["Origin"]
        assert {client.post(path, data=data).status_code for path, data in forms} == {403}
        assert client.get("/batch", headers={"Origin": "https://evil.example"}).status_code == 403
    after = locked.client.batches.list().data
    assert [batch.id for batch in after] == [batch.id for batch in before]
    assert not any(batch.status in ("cancelling", "cancelled") for batch in after)


@pytest.mark.parametrize("path", ["/batch", "/batch/batch_no", "/batch/files/file-no"])
def test_every_answer_forbids_to_load_run_and_frame(serve: Serve, path: str) -> None:
    headers = httpx.get(serve().url + path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")


def test_the_page_loads_nothing(serve: Serve) -> None:
    """No address in it leads to another host, and only its own style and script may be."""
    answer = httpx.get(serve().url + "/batch")
    assert not re.search(r"""(src|href|action|url)\s*[=(]\s*["']?(https?:)?//""", answer.text)
    inline = re.findall(r"<(style|script)>(.*?)</\1>", answer.text, re.DOTALL)
    assert [kind for kind, _ in inline] == ["style", "script"] == re.findall(r"<(style|script)\b", answer.text)
    for kind, text in inline:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in answer.headers["content-security-policy"]


def test_a_page_shows_no_more_however_much_there_is(serve: Serve, tmp_path: Path) -> None:
    """Batches by twenty, failures by twenty, files by fifty."""
    api = serve()
    failing = [row(number, prompt=[1, 999]) for number in range(3000)]
    ended = wait_for(api.client, begin(api.client, failing).id)
    one = httpx.get(f"{api.url}/batch/{ended.id}").text
    assert one.count("out of luck") == 20 and "3,000 failed" in one
    assert len(one) < 30_000
    file_ids = [upload(api.client, rows_of(1)) for _ in range(60)]
    for file_id in file_ids[:45]:
        api.client.batches.create(input_file_id=file_id, **FORM)  # type: ignore[arg-type] # FORM is of the page's form
    pages, path = [], "/batch"
    while path:
        page = httpx.get(api.url + path).text
        pages.append(re.findall(r'data-batch="(batch_\w+)"', page))
        older = re.search(r'rel="next" href="([^"]+)"', page)
        path = older[1] if older else ""
    assert page.count("<option value=") == 50
    assert [len(found) for found in pages] == [20, 20, 6]
    api_ids = [batch.id for batch in api.client.batches.list(limit=_MAX_PAGE).data]
    assert [batch_id for found in pages for batch_id in found] == api_ids


def test_what_is_wrong_is_said_on_the_page(serve: Serve) -> None:
    """With the status that the API has for it, and the forms still there."""
    api = serve()
    file_id = upload(api.client, rows_of(2))
    batch = wait_for(api.client, begin(api.client, rows_of(2)).id)
    with browser(api) as client:
        no_file = client.post("/batch/batches", data=FORM | {"input_file_id": "file-<i>"})
        window = client.post("/batch/batches", data=FORM | {"input_file_id": file_id, "completion_window": "soon"})
        cancelled = client.post(f"/batch/{batch.id}/cancel")
        multipart = client.post("/batch/files", files={"purpose": (None, "fine-tune"), "file": ("a", b"{}\n")})
        plain = client.post("/batch/batches", content=b"x", headers={"content-type": "text/plain"})
        long = client.post("/batch/batches", data={"a": "x" * 20_000})
        many = client.post("/batch/batches", data={f"a{i}": "x" for i in range(40)})
    answers = [no_file, window, cancelled, multipart, plain, long, many]
    assert [answer.status_code for answer in answers] == [404, 400, 409, 400, 415, 413, 400]
    told = [re.search(r'id="told"><bdi>(.*?)</bdi>', answer.text) for answer in answers]
    assert all(told) and all("Create batch" in answer.text for answer in answers)
    assert told[0] is not None and told[0][1] == "No such File object: file-&lt;i&gt;"
    assert all('id="refresh" href="/batch"' in answer.text for answer in answers)
    assert httpx.get(f"{api.url}/batch?after=batch_no").status_code == 404
    assert httpx.get(f"{api.url}/batch/batch_<script>").status_code == 404
    assert "batch_<script>" not in httpx.get(f"{api.url}/batch/batch_<script>").text
    assert len(api.client.batches.list().data) == 1


def test_a_server_that_is_not_started_shows_what_it_has_and_takes_nothing(serve: Serve) -> None:
    api = serve(is_started=False)
    with browser(api) as client:
        assert client.get("/batch").status_code == 200
        refused = client.post("/batch/batches", data=FORM | {"input_file_id": "file-1"})
        assert refused.status_code == 503 and "starting or stopping" in refused.text


def test_a_file_keeps_its_name_and_its_bytes(serve: Serve) -> None:
    """Whatever it is called; the name is in no header but as the standard says."""
    api = serve()
    name = 'ü"; filename=evil.exe\u202e.jsonl'
    data = jsonl(rows_of(4))
    file = api.client.files.create(file=(name, data), purpose="batch")
    answer = httpx.get(f"{api.url}/batch/files/{file.id}")
    assert answer.content == data
    disposition = answer.headers["content-disposition"]
    assert disposition.isascii() and disposition.startswith(f'attachment; filename="{file.id}.jsonl"; ')
    assert "%C3%BC" in disposition and "evil.exe" in disposition and disposition.count('"') == 2


def test_the_file_of_errors_may_be_gone(serve: Serve) -> None:
    """Deleted through the API, it is not offered, and its reasons are still there."""
    api = serve()
    batch = wait_for(api.client, begin(api.client, [row(1, prompt=[1, 999])]).id)
    assert len(lines_of(api.client, batch.error_file_id)) == 1
    assert batch.error_file_id is not None
    assert 'id="errors"' in httpx.get(f"{api.url}/batch/{batch.id}").text
    api.client.files.delete(batch.error_file_id)
    page = httpx.get(f"{api.url}/batch/{batch.id}").text
    assert 'id="errors"' not in page and "aborted" in page
    assert httpx.get(f"{api.url}/batch/files/{batch.error_file_id}").status_code == 404
