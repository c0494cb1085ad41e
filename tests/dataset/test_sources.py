"""Inputs of every kind: files, pipes, URLs, compressed or not, and what is refused."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import http.server
import io
import json
import lzma
import os
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest

from batchllm.dataset import BadRow, Input, Row, jsonl, open_input, read_rows
from batchllm.dataset.sources import InputFormat
from batchllm.errors import ConfigError, WorkloadError
from batchllm.request import SamplingParams

LINES = b"".join(b'{"id":"r%d","prompt":"prompt number %d"}\n' % (number, number * 7919) for number in range(20_000))

COPY_OF_STDIN = f"copy-{xxh3_64_hexdigest(b'-')}"


def zstd(data: bytes) -> bytes:
    """Without checksum and content size: what a streaming writer leaves."""
    writer = zstandard.ZstdCompressor().compressobj()
    return writer.compress(data) + writer.flush()


def zstd_with_a_large_window(data: bytes) -> bytes:
    """What ``zstd --long=30`` writes, behind a frame that holds no data."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=30, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"none" + writer.compress(data) + writer.flush()


def lz4(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def twice(data: bytes) -> bytes:
    return gzip.compress(bz2.compress(data))


COMPRESS = [gzip.compress, zstd, bz2.compress, lzma.compress, lz4, zstd_with_a_large_window]
each_compression = pytest.mark.parametrize("compress", COMPRESS)


def ids_of(source: Input | Path) -> list[str | int | None]:
    return [row.given_id for row in read_rows(source, defaults=SamplingParams())]


ALL_IDS = [f"r{number}" for number in range(20_000)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# ---- compressed files


@each_compression
@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst", "anything"])
def test_a_compressed_file_is_told_by_its_contents(tmp_path: Path, compress: Any, suffix: str) -> None:
    assert ids_of(write(tmp_path / f"in.{suffix}", compress(LINES))) == ALL_IDS


@each_compression
def test_parts_compressed_one_by_one_and_put_together_are_all_read(tmp_path: Path, compress: Any) -> None:
    half = LINES.index(b"\n", len(LINES) // 2) - 5
    assert ids_of(write(tmp_path / "in", compress(LINES[:half]) + compress(LINES[half:]))) == ALL_IDS


@each_compression
@pytest.mark.parametrize("damage", ["cut", "cut at the end", "followed by junk"])
def test_a_damaged_file_gives_the_rows_before_and_says_how_many(tmp_path: Path, compress: Any, damage: str) -> None:
    whole = compress(LINES)
    data = {"cut": whole[: len(whole) // 2], "cut at the end": whole[:-1], "followed by junk": whole + b"junk"}[damage]
    path = write(tmp_path / "in", data)
    if (compress, damage) == (lzma.compress, "followed by junk"):  # the library takes no notice
        assert ids_of(path) == ALL_IDS
        return
    seen = []
    with pytest.raises(WorkloadError, match=r"in: reading stopped after (\d+) rows") as caught:
        for row in read_rows(path, defaults=SamplingParams()):
            assert isinstance(row, Row)
            seen.append(row.given_id)
    assert seen == ALL_IDS[: len(seen)]
    assert f"after {len(seen)} rows" in str(caught.value)


def test_a_file_compressed_twice_is_read_and_one_compressed_for_ever_is_not(tmp_path: Path) -> None:
    assert ids_of(write(tmp_path / "in", twice(LINES))) == ALL_IDS
    data = b"{}"
    for _ in range(20):
        data = gzip.compress(data)
    with pytest.raises(ConfigError, match="compressed more than 8 times"):
        open_input(str(write(tmp_path / "for_ever", data)), spool_folder=None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_other_encodings_are_read_as_utf_8(tmp_path: Path, encoding: str, compress: Any) -> None:
    text = '{"id":"é","prompt":"🦀 один"}\n{"id":"b","prompt":"x"}\n'
    path = write(tmp_path / "in", compress(text.encode(encoding)))
    first, second = read_rows(path, defaults=SamplingParams())
    assert isinstance(first, Row) and isinstance(second, Row)
    assert (first.given_id, first.request.prompt, second.given_id) == ("é", "🦀 один", "b")


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"PK\x03\x04" + bytes(30), "a ZIP archive"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(30), "a 7z archive"),
        (b"rows.jsonl".ljust(257, b"\0") + b"ustar" + bytes(300), "a tar archive"),
        (b"SQLite format 3\x00" + bytes(90), "an SQLite database"),
        (pickle.dumps([{"id": 1}]), "a Python pickle"),
        (b"\x93NUMPY\x01\x00", "a numpy array"),
        (b"FEA1" + bytes(20), "a Feather file of version 1"),
        (b"ORC\x08", "an ORC file"),
        (b"Obj\x01\x04", "an Avro file"),
        (b"\xff\x06\x00\x00sNaPpY", "compressed with snappy"),
        (b"\n <!DOCTYPE html><html>", "HTML or XML"),
        (b"%PDF-1.7", "a PDF"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress], ids=["plain", "gzip", "bz2"])
def test_what_is_not_read_is_named_once(tmp_path: Path, head: bytes, name: str, compress: Any) -> None:
    """Not told as so many bad rows."""
    with pytest.raises(ConfigError) as refused:
        open_input(str(write(tmp_path / "in.jsonl", compress(head))), spool_folder=None)
    assert name in str(refused.value) and "in.jsonl" in str(refused.value)
    assert (compress is bytes) != ("inside" in str(refused.value))


def test_a_table_inside_a_compression_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "t")
    with pytest.raises(ConfigError, match="is a parquet table, inside gzip"):
        open_input(str(write(tmp_path / "in.gz", gzip.compress((tmp_path / "t").read_bytes()))), spool_folder=None)


# ---- one array

_items = st.lists(
    st.fixed_dictionaries(
        {"id": st.text(min_size=1, max_size=4), "prompt": st.text(min_size=1, max_size=9)},
        optional={"sampling_params": st.just({"temperature": 0.5, "stop": ["[", "]", "},"]})},
    ),
    min_size=1,
    max_size=6,
)


@given(items=_items, indent=st.sampled_from([None, 1]), is_ascii=st.booleans(), block=st.integers(1, 40))
def test_an_array_of_rows_is_its_rows_wherever_it_is_cut(
    items: list[Any], indent: int | None, is_ascii: bool, block: int
) -> None:
    data = json.dumps(items, indent=indent, ensure_ascii=is_ascii).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "_BLOCK_LEN", block)
        records = list(jsonl.parse_lines(io.BytesIO(b"\xef\xbb\xbf " + data + b"\n")))
    assert records == [(number, item) for number, item in enumerate(items, start=1)]


@pytest.mark.parametrize(
    ("data", "num_rows", "why"),
    [
        (b'[{"id": "a", "prompt": "x"}, {"id"', 1, "item 2"),
        (b'[{"id": "a", "prompt": "x"}', 1, "item 2"),
        (b'[{"id": "a", "prompt": "x"} {"id": "b"}]', 1, "item 2"),
        (b'[{"id": "a", "prompt": "x"}] more', 1, "something stands behind"),
        (b'[\n{"id": "a", "prompt": "x"},\n]', 1, "item 2"),
        (b"[", 0, "item 1"),
        (b'[{"id": "a", "prompt": "\xff"}]', 0, "not UTF-8"),
    ],
)
def test_an_array_that_is_damaged_gives_the_rows_before(tmp_path: Path, data: bytes, num_rows: int, why: str) -> None:
    seen = []
    with pytest.raises(WorkloadError, match=f"after {num_rows} rows.*{why}"):
        seen.extend(iter_rows(write(tmp_path / "in.json", data)))
    assert all(isinstance(row, Row) for row in seen)


def iter_rows(path: Path) -> Any:
    yield from read_rows(path, defaults=SamplingParams())


@pytest.mark.parametrize("number", ["1" * 5_000, "-" + "1" * 5_000, "1" * 5_000 + ".5", "1e5000", "NaN"])
def test_a_number_of_any_length_fails_its_item_alone(tmp_path: Path, number: str) -> None:
    """Python refuses to make a number of so many digits; the item ended the command with a traceback."""
    data = f'[{{"id": "a", "prompt": "x", "n": {number}}}, {{"id": "b", "prompt": "y"}}]'.encode()
    rows = list(read_rows(write(tmp_path / "in.json", data), defaults=SamplingParams()))
    assert [type(row) for row in rows] == [BadRow, Row]


def test_a_long_item_of_an_array_is_begun_anew_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once for each block of it: a file of one such item would keep a server busy for hours."""
    monkeypatch.setattr(jsonl, "_BLOCK_LEN", 100)
    starts = []
    decode = jsonl._DECODER.raw_decode
    monkeypatch.setattr(jsonl._DECODER, "raw_decode", lambda *given: starts.append(given) or decode(*given))
    data = b'[\n{"prompt": "' + b"x" * 1_000_000 + b'"}\n]'
    assert len(list(jsonl.parse_lines(io.BytesIO(data)))) == 1
    assert len(starts) < 30


def test_an_item_that_is_no_row_fails_alone(tmp_path: Path) -> None:
    data = b'[{"id": "a", "prompt": "x"}, 7, {"id": "b"}, [], {"id": "c", "prompt": "z"}]'
    rows = list(read_rows(write(tmp_path / "in.json", data), defaults=SamplingParams()))
    assert [(type(row), row.line) for row in rows] == [(Row, 1), (BadRow, 2), (BadRow, 3), (BadRow, 4), (Row, 5)]
    empty = write(tmp_path / "empty.json", b"[]")
    with pytest.raises(WorkloadError, match="no rows"):
        list(read_rows(empty, defaults=SamplingParams()))


@pytest.mark.parametrize("line", [b"[1, 2]", b"[]", b' [{"id": "b", "prompt": "x"}] ', b"[{}]\n\n"])
def test_a_first_line_that_is_an_array_is_a_bad_row_if_rows_follow(tmp_path: Path, line: bytes) -> None:
    data = line + b'\n{"id": "a", "prompt": "x"}\n'
    rows = list(read_rows(write(tmp_path / "in", data), defaults=SamplingParams()))
    assert [(type(row), row.line) for row in rows] == [(BadRow, 1), (Row, data.count(b"\n"))]


def test_an_array_on_one_line_is_its_rows_if_nothing_follows(tmp_path: Path) -> None:
    data = b'[{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}]\n \n\n'
    rows = list(read_rows(write(tmp_path / "in", data), defaults=SamplingParams()))
    assert [(type(row), row.line) for row in rows] == [(Row, 1), (Row, 2)]


# ---- local files


def test_a_local_file_is_used_in_its_place(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", LINES)
    source = open_input(str(path), spool_folder=tmp_path / "spool")
    assert (source.name, source.format, source.local_paths, source.spool_path) == (str(path), "jsonl", (path,), None)
    assert not (tmp_path / "spool").exists()


def test_formats_are_told_by_contents_and_can_be_forced(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["x"]})
    pq.write_table(table, tmp_path / "no-suffix")
    (tmp_path / "folder").mkdir()
    pq.write_table(table, tmp_path / "folder" / "b.parquet")
    pq.write_table(table, tmp_path / "folder" / "a.parquet")

    def format_of(name: str, forced: InputFormat | None = None) -> str:
        return open_input(str(tmp_path / name), spool_folder=None, input_format=forced).format

    assert format_of("no-suffix") == "parquet"
    with pytest.raises(ConfigError, match="no-suffix: is a parquet table"):
        format_of("no-suffix", "jsonl")
    write(tmp_path / "names.txt", b"prompt,id\nx,1\n")
    with pytest.raises(ConfigError, match="give --input-format csv"):
        format_of("names.txt")
    assert format_of("names.txt", "csv") == "csv"
    assert format_of("folder") == "parquet"
    with pytest.raises(ConfigError, match="not an input of format hf, but of parquet"):
        format_of("folder", "hf")
    names = [path.name for path in open_input(str(tmp_path / "folder"), spool_folder=None).local_paths]
    assert names == ["a.parquet", "b.parquet"]


@pytest.mark.parametrize("given", ["none.jsonl", "a\0b", "none/x", ""])
def test_what_cannot_be_opened_is_a_config_error_naming_flag_and_path(given: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--input .*cannot be read"):
        open_input(given and str(tmp_path / given), spool_folder=tmp_path, flag="--input")


def test_a_directory_of_other_files_is_a_config_error(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", LINES)
    with pytest.raises(ConfigError, match=r"-i .*is a directory without \*\.parquet files"):
        open_input(str(tmp_path), spool_folder=None)


# ---- the hash


def test_the_hash_is_of_the_contents_whatever_the_name(tmp_path: Path) -> None:
    def hash_of(name: str, data: bytes) -> str:
        return open_input(str(write(tmp_path / name, data)), spool_folder=None).content_hash()

    big = LINES * 3
    assert len(big) > 2 << 20
    assert hash_of("a", big) == hash_of("b", big)
    assert len({hash_of("c", data) for data in (big, big + b"\n", big[:-1], b"", LINES)}) == 5
    assert len(hash_of("d", big)) == 32


def test_the_hash_of_a_directory_knows_names_and_where_files_end(tmp_path: Path) -> None:
    def hash_of(name: str, files: dict[str, bytes]) -> str:
        (tmp_path / name).mkdir()
        for file, data in files.items():
            write(tmp_path / name / file, data)
        return open_input(str(tmp_path / name), spool_folder=None).content_hash()

    one = {"a.parquet": b"PAR1ab", "b.parquet": b"c"}
    same = hash_of("one", one)
    assert hash_of("other folder", one) == same
    others = [{"a.parquet": b"PAR1a", "b.parquet": b"bc"}, {"a.parquet": b"PAR1ab", "c.parquet": b"c"}]
    assert same not in [hash_of(f"{number}", files) for number, files in enumerate(others)]


def test_a_file_that_is_gone_when_it_is_hashed_is_a_config_error(tmp_path: Path) -> None:
    source = open_input(str(write(tmp_path / "in", LINES)), spool_folder=None)
    (tmp_path / "in").unlink()
    with pytest.raises(ConfigError, match=r"-i .*in: cannot be read"):
        source.content_hash()


# ---- stdin and pipes


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A real pipe in the place of stdin; calling it writes data into it from a thread and closes it."""
    reading, writing = os.pipe()
    threads: list[threading.Thread] = []

    def feed(data: bytes) -> None:
        def send() -> None:
            with open(writing, "wb") as pipe:
                pipe.write(data)

        threads.append(threading.Thread(target=send))
        threads[0].start()

    with open(reading) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield feed
    for thread in threads:
        thread.join()
    if not threads:
        os.close(writing)


@pytest.mark.parametrize("compress", [bytes, *COMPRESS])
def test_stdin_is_copied_and_can_be_hashed_and_read_twice(tmp_path: Path, stdin: Any, compress: Any) -> None:
    data = compress(LINES)
    stdin(data)
    source = open_input("-", spool_folder=tmp_path / "made" / "spool")
    assert source.spool_path is not None and source.local_paths == (source.spool_path,)
    assert source.spool_path.read_bytes() == data
    assert [path.name for path in source.spool_path.parent.iterdir()] == [source.spool_path.name]
    assert source.content_hash() == open_input(str(write(tmp_path / "same", data)), spool_folder=None).content_hash()
    assert ids_of(source) == ids_of(source) == ALL_IDS


def test_stdin_may_be_a_parquet_file(tmp_path: Path, stdin: Any) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": ["a"], "prompt": ["x"]}), buffer)
    stdin(buffer.getvalue())
    assert ids_of(open_input("-", spool_folder=tmp_path)) == ["a"]


def test_a_finished_copy_is_used_again_only_if_asked_for(tmp_path: Path, stdin: Any) -> None:
    write(tmp_path / COPY_OF_STDIN, b'{"id":"old","prompt":"x"}\n')
    assert ids_of(open_input("-", spool_folder=tmp_path, reuse_spool=True)) == ["old"]
    stdin(b'{"id":"new","prompt":"x"}\n')
    assert ids_of(open_input("-", spool_folder=tmp_path)) == ["new"]
    assert ids_of(open_input("-", spool_folder=tmp_path, reuse_spool=True)) == ["new"]


def test_an_unfinished_copy_is_not_taken_for_a_finished_one(tmp_path: Path, stdin: Any) -> None:
    write(tmp_path / f"{COPY_OF_STDIN}.unfinished", b'{"id":"half","prompt":"x"}\n')
    stdin(b'{"id":"whole","prompt":"x"}\n')
    assert ids_of(open_input("-", spool_folder=tmp_path, reuse_spool=True)) == ["whole"]
    assert os.listdir(tmp_path) == [COPY_OF_STDIN]


@pytest.mark.parametrize("name", ["stdin", "stdin.unfinished", "input"])
def test_a_copy_replaces_nothing_of_the_users_own(tmp_path: Path, stdin: Any, name: str) -> None:
    """Whose folder of the job may hold other things."""
    (tmp_path / name).mkdir()
    precious = write(tmp_path / name / "thesis.txt", b"mine")
    stdin(b'{"id":"a","prompt":"x"}\n')
    assert ids_of(open_input("-", spool_folder=tmp_path)) == ["a"]
    assert precious.read_bytes() == b"mine"


def test_a_copy_that_fails_leaves_nothing_and_names_the_flag(tmp_path: Path, stdin: Any) -> None:
    blocked = write(tmp_path / "file", b"")
    with pytest.raises(ConfigError, match=r"-i -: cannot be copied to .*file"):
        open_input("-", spool_folder=blocked)


def test_closed_stdin_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after `<&-`
    with pytest.raises(ConfigError, match=r"-i -: .*standard input is closed"):
        open_input("-", spool_folder=tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_named_pipe_is_copied_too(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    thread = threading.Thread(target=path.write_bytes, args=(LINES,))
    thread.start()
    source = open_input(str(path), spool_folder=tmp_path / "spool")
    thread.join()
    assert ids_of(source) == ids_of(source) == ALL_IDS


def test_what_can_be_read_only_once_needs_a_folder() -> None:
    for name in ("-", "memory://x", "/dev/null"):
        with pytest.raises(ConfigError, match=rf"-i {name}: can be read only once"):
            open_input(name, spool_folder=None)


# ---- URLs


@pytest.fixture
def memory() -> Iterator[Any]:
    """fsspec's file system in memory, empty before and after."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def test_a_url_is_copied_and_the_copy_is_used_again_if_asked_for(tmp_path: Path, memory: Any) -> None:
    memory.pipe("/folder/in.jsonl.gz", gzip.compress(LINES))
    source = open_input("memory://folder/in.jsonl.gz", spool_folder=tmp_path)
    assert source.name == "memory://folder/in.jsonl.gz"
    assert source.spool_path is not None and source.spool_path.parent == tmp_path
    assert ids_of(source) == ALL_IDS
    memory.store.clear()
    again = open_input("memory://folder/in.jsonl.gz", spool_folder=tmp_path, reuse_spool=True)
    assert again == source and ids_of(again) == ALL_IDS


def test_copies_of_two_urls_are_two(tmp_path: Path, memory: Any) -> None:
    for name in ("a", "b"):
        memory.pipe(f"/{name}/in", b'{"id":"%s","prompt":"x"}' % name.encode())
    first, second = (open_input(f"memory://{name}/in", spool_folder=tmp_path) for name in ("a", "b"))
    assert (ids_of(first), ids_of(second)) == (["a"], ["b"])


def test_a_url_may_be_a_directory_of_parquet_files(tmp_path: Path, memory: Any) -> None:
    for number in range(2):
        with memory.open(f"/folder/part-{number}.parquet", "wb") as file:
            pq.write_table(pa.table({"id": [f"r{number}"], "prompt": ["x"]}), file)
    memory.pipe("/folder/readme.md", b"not to be read")
    for _ in range(2):
        source = open_input("memory://folder", spool_folder=tmp_path)
        assert [path.name for path in source.local_paths] == ["part-0.parquet", "part-1.parquet"]
        assert ids_of(source) == ["r0", "r1"]
        assert len(os.listdir(tmp_path)) == 1


@contextlib.contextmanager
def serving(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """A web server on this machine; gives its URL."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Folder(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


class HangsUp(Folder):
    """Promises more than it sends."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(LINES)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(LINES[: len(LINES) // 2])
        self.close_connection = True


def test_a_url_of_a_web_server_is_copied(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    write(tmp_path / "served" / "in.jsonl", LINES)
    with serving(functools.partial(Folder, directory=str(tmp_path / "served"))) as url:
        assert ids_of(open_input(f"{url}/in.jsonl", spool_folder=tmp_path / "spool")) == ALL_IDS
        with pytest.raises(ConfigError, match=rf"-i {url}/none: cannot be read"):
            open_input(f"{url}/none", spool_folder=tmp_path / "spool")


def test_a_copy_that_breaks_off_midway_leaves_nothing(tmp_path: Path) -> None:
    with serving(HangsUp) as url, pytest.raises(ConfigError, match=rf"-i {url}/in\.jsonl: cannot be read"):
        open_input(f"{url}/in.jsonl", spool_folder=tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("memory://none", "cannot be read: FileNotFoundError"),
        ("nonsense://x", "cannot be read: ValueError: Protocol not known"),
    ],
)
def test_a_url_that_cannot_be_read_is_a_config_error(tmp_path: Path, memory: Any, url: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"-i {url}: {why}"):
        open_input(url, spool_folder=tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_protocol_whose_package_is_missing_says_which(tmp_path: Path) -> None:
    fsspec.register_implementation(
        "missing", "no_such_package.Files", errtxt="Install no_such_package to read missing://"
    )
    with pytest.raises(ConfigError, match=r"needs a package that is not installed: Install no_such_package"):
        open_input("missing://x", spool_folder=tmp_path)
