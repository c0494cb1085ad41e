"""The patch series: how scripts/apply_patches treats an installed sglang, and that what is patched computes the same.

Nothing here touches the installed package: all happens on copies of the files that the series names.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import resource
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from batchllm.srt import compat

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "apply_patches"
SERIES = ROOT / "patches"
BACKEND = "srt/layers/attention/torch_native_backend.py"


# A series of two patches on made-up files: the second goes on where the first has ended, and to a file of its own.

A0, A1, A2 = "one\ntwo\nthree\n", "one\n2\nthree\n", "one\n2\nthree\nfour\n"
B0, B1 = "x = 1\n# and more, in no hunk\n", "x = 2\n# and more, in no hunk\n"


def _blob_id(text: str) -> str:
    return hashlib.sha1(f"blob {len(text)}\0{text}".encode()).hexdigest()


def _change(path: str, before: str, after: str, hunk: str) -> str:
    index = f"index {_blob_id(before)}..{_blob_id(after)} 100644"
    return f"diff --git a/{path} b/{path}\n{index}\n--- a/{path}\n+++ b/{path}\n{hunk}"


def _write_series(folder: Path) -> Path:
    folder.mkdir()
    head = "Why: a test.\nApplies-To: sglang==1.2.3\n---\n"
    first = _change("a.py", A0, A1, "@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n")
    second = _change("a.py", A1, A2, "@@ -2,2 +2,3 @@ def f():\n 2\n three\n+four\n")
    third = _change("deep/b.py", B0, B1, "@@ -1 +1 @@\n-x = 1\n+x = 2\n")
    (folder / "0001-first.patch").write_text(head + first)
    (folder / "0002-second.patch").write_text(head + second + third)
    return folder


class Copy:
    """A package to patch, and the series for it."""

    def __init__(self, package: Path, series: Path) -> None:
        self.package = package
        self.series = series

    def run(self, action: str, max_file_size: int | None = None) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            if max_file_size is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_size, max_file_size))

        command = [sys.executable, SCRIPT, action, "--target", self.package, "--series", self.series]
        return subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)

    def contents(self) -> dict[str, bytes]:
        files = (path for path in self.package.rglob("*") if path.is_file())
        return {str(path.relative_to(self.package)): path.read_bytes() for path in files}

    def is_refused(self, action: str, *says: str, **limits: int) -> None:
        before = self.contents()
        done = self.run(action, **limits)
        assert done.returncode == 2, done.stdout
        assert "Traceback" not in done.stderr
        for words in says:
            assert words in done.stderr
        assert self.contents() == before


@pytest.fixture
def small(tmp_path: Path) -> Copy:
    """The made-up series, not applied."""
    package = tmp_path / "site" / "sglang"
    (package / "deep").mkdir(parents=True)
    (package / "a.py").write_text(A0)
    (package / "deep/b.py").write_text(B0)
    _write_metadata(package, "1.2.3")
    return Copy(package, _write_series(tmp_path / "series"))


@pytest.fixture
def real(tmp_path: Path) -> Copy:
    """The installed files that the real series names, as released even where the series is applied."""
    package = tmp_path / "site" / "sglang"
    (package / BACKEND).parent.mkdir(parents=True)
    shutil.copy2(_installed() / BACKEND, package / BACKEND)
    _write_metadata(package, compat.SGLANG_VERSION)
    copy = Copy(package, SERIES)
    assert copy.run("revert").returncode == 0
    return copy


def _installed() -> Path:
    """Found, not imported."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _write_metadata(package: Path, version: str) -> None:
    for old in package.parent.glob("sglang-*.dist-info"):
        shutil.rmtree(old)
    folder = package.parent / f"sglang-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: sglang\nVersion: {version}\n")


# The script


def test_the_series_is_applied_found_applied_and_taken_back(real: Copy) -> None:
    """Byte for byte, and each action may be repeated."""
    released = real.contents()
    assert real.run("status").returncode == 1
    assert real.run("apply").returncode == 0
    patched = real.contents()
    assert patched != released
    status = real.run("status")
    assert (status.returncode, status.stdout.count(": applied")) == (0, len(list(SERIES.glob("*.patch"))))
    again = real.run("apply")
    assert (again.returncode, "already applied" in again.stdout) == (0, True)
    assert real.contents() == patched
    assert real.run("revert").returncode == 0
    assert real.contents() == released
    again = real.run("revert")
    assert (again.returncode, "nothing to revert" in again.stdout) == (0, True)
    assert real.contents() == released


def test_the_series_is_for_the_version_that_the_package_extends(real: Copy) -> None:
    for patch in SERIES.glob("*.patch"):
        assert f"Applies-To: sglang=={compat.SGLANG_VERSION}\n" in patch.read_text()


def test_the_default_target_is_the_environment_s_own_package() -> None:
    done = subprocess.run([SCRIPT, "status"], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    assert str(_installed()) in done.stdout


def test_patches_are_taken_in_the_order_of_their_names_and_taken_back_in_reverse(small: Copy) -> None:
    first, second = "0001-first.patch", "0002-second.patch"
    for action, names in (("status", [first, second]), ("apply", [first, second]), ("revert", [second, first])):
        lines = small.run(action).stdout.splitlines()
        assert [line.split(":")[0] for line in lines if ".patch" in line] == names
    assert small.run("apply").returncode == 0
    assert (small.package / "a.py").read_text() == A2


def test_another_version_is_refused_and_both_are_named(small: Copy) -> None:
    _write_metadata(small.package, "1.2.4")
    for action in ("status", "apply", "revert"):
        small.is_refused(action, "1.2.3", "1.2.4", "0001-first.patch")


def test_a_package_of_unknown_version_is_refused(small: Copy) -> None:
    shutil.rmtree(small.package.parent / "sglang-1.2.3.dist-info")
    small.is_refused("apply", "dist-info", str(small.package))


def test_a_modified_file_is_refused_and_no_other_file_is_touched(small: Copy) -> None:
    """Even where no hunk would notice: what a revert gives back must be what was there."""
    (small.package / "deep/b.py").write_text("x = 1\n\ny = 0\n")
    for action in ("status", "apply", "revert"):
        small.is_refused(action, "deep/b.py", "modified", "0002-second.patch")


def test_a_missing_file_is_refused(small: Copy) -> None:
    (small.package / "deep/b.py").unlink()
    small.is_refused("apply", "deep/b.py", "no such file")


def test_a_full_disk_leaves_all_as_it_was(small: Copy) -> None:
    """Simulated by a limit that the new a.py stays under and the new deep/b.py does not."""
    assert len(A2) < 20 < len(B1)
    small.is_refused("apply", "File too large", max_file_size=20)


@pytest.mark.parametrize("action", ["apply", "revert"])
def test_a_half_applied_patch_is_named_and_brought_to_either_end(small: Copy, action: str) -> None:
    """As an interruption between two renames leaves it."""
    released = small.contents()
    assert small.run("apply").returncode == 0
    applied = small.contents()
    (small.package / "deep/b.py").write_bytes(released["deep/b.py"])
    status = small.run("status")
    assert status.returncode == 1
    assert "0001-first.patch: applied\n" in status.stdout
    assert "0002-second.patch: half applied, not to deep/b.py" in status.stdout
    assert "half applied" in small.run(action).stdout
    assert small.contents() == (applied if action == "apply" else released)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (("-x = 1", "-x = 0"), "does not match"),
        (("+x = 2", "+x = 3"), "does not make the file"),
        (("\n three\n+four", "\n\n+four"), "is damaged"),
        (("@@ -1 +1 @@", "@@ -one +1 @@"), "hunk header"),
        (("index ", "new file mode 100644\nindex "), "--full-index"),
        (("Applies-To", "Applied-To"), "Applies-To"),
    ],
)
def test_a_damaged_patch_is_refused_before_any_file_is_touched(small: Copy, damage: tuple[str, str], says: str) -> None:
    patch = small.series / "0002-second.patch"
    assert damage[0] in patch.read_text()
    patch.write_text(patch.read_text().replace(*damage))
    small.is_refused("apply", "0002-second.patch", says)


def test_patches_that_do_not_follow_from_each_other_are_refused(small: Copy) -> None:
    (small.series / "0001-first.patch").rename(small.series / "0003-first.patch")
    small.is_refused("apply", "0003-first.patch", "0002-second.patch")


def test_the_other_name_of_a_hard_link_stays_pristine(small: Copy) -> None:
    """uv installs by hard link: writing through one would patch its cache, and every environment made from it."""
    cached = small.package.parent / "cached.py"
    os.link(small.package / "a.py", cached)
    assert small.run("apply").returncode == 0
    assert cached.read_text() == A0
    assert small.run("revert").returncode == 0
    assert cached.stat().st_nlink == 1


def test_permissions_stay_and_byte_code_grows_stale(small: Copy) -> None:
    """Byte code is matched with its source by the second of its last change, so each action must move it."""
    file = small.package / "a.py"
    file.chmod(0o640)
    seconds = [int(file.stat().st_mtime)]
    for action in ("apply", "revert", "apply"):
        assert small.run(action).returncode == 0
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
        seconds.append(int(file.stat().st_mtime))
    assert len(set(seconds)) == 4
    assert sorted(path.name for path in small.package.iterdir()) == ["a.py", "deep"]


# 0001: extend attention


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """The benchmark beside the patch, whose batches serve here too. Loading it takes torch."""
    spec = importlib.util.spec_from_file_location("bench_torch_native_extend", SERIES / "bench_torch_native_extend.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backends(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The released and the patched class, side by side. Their imports take a quarter of a minute."""
    folder = tmp_path_factory.mktemp("backends")
    return tuple(
        bench.load_backend(bench.copy_module(folder / action, action), f"torch_native_after_{action}")
        for action in ("revert", "apply")
    )


BATCHES = {
    "nothing cached": ([0, 0, 0], [5, 1, 17]),
    "every T of a short sequence": (list(range(11, -1, -1)), list(range(1, 13))),
    "decode rows": ([7, 299, 1, 64], [1, 1, 1, 1]),
    "mixed batch": ([250, 0, 33, 299, 12], [25, 40, 1, 1, 90]),
    "tiles of the kernel and beyond": ([512, 513, 31, 1], [32, 33, 513, 600]),
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads", [(8, 4), (6, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES)
def test_extend_attention_is_what_it_was(
    bench: ModuleType, backends: tuple[Any, Any], lens: tuple[list[int], list[int]], heads: tuple[int, int], dtype: str
) -> None:
    """Released and patched function on the same batch; the same sums in another order, so to rounding."""
    import torch

    batch = bench.ExtendBatch.random(
        *lens, num_heads=heads[0], num_kv_heads=heads[1], head_dim=16, dtype=getattr(torch, dtype)
    )
    before, after = (batch.attend(backend) for backend in backends)
    assert torch.isfinite(after).all()
    tolerance = {"float32": 2e-6, "bfloat16": 2**-7}[dtype]
    torch.testing.assert_close(after, before, atol=tolerance, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", [{"causal": False}, {"window": 0}, {"window": 20}], ids=str)
def test_what_is_not_plain_causal_attention_takes_the_code_it_took(
    bench: ModuleType, backends: tuple[Any, Any], case: dict[str, Any]
) -> None:
    import torch

    batch = bench.ExtendBatch.random(*BATCHES["mixed batch"])
    before, after = (batch.attend(backend, **case) for backend in backends)
    torch.testing.assert_close(after, before, atol=0, rtol=0)


@pytest.mark.slow
def test_extend_attention_leaves_the_prefix_out(
    bench: ModuleType, backends: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim of the patch, counted: rows that attention is asked for."""
    prefix_lens, extend_lens = BATCHES["mixed batch"]
    batch = bench.ExtendBatch.random(prefix_lens, extend_lens)

    def rows_asked_for(backend: Any) -> list[int]:
        module, rows = sys.modules[backend.__module__], []
        attention = module.scaled_dot_product_attention

        def count(query: Any, *args: Any, **kwargs: Any) -> Any:
            rows.append(query.shape[-2])
            return attention(query, *args, **kwargs)

        monkeypatch.setattr(module, "scaled_dot_product_attention", count)
        batch.attend(backend)
        return rows

    released, patched = backends
    assert rows_asked_for(released) == [sum(lens) for lens in zip(prefix_lens, extend_lens, strict=True)]
    assert rows_asked_for(patched) == extend_lens


@pytest.mark.slow
def test_a_patched_installation_passes_the_check_at_start(backends: tuple[Any, Any]) -> None:
    """The check at start refuses modified upstream functions, so the series must change none that it knows."""
    released, patched = (sys.modules[backend.__module__] for backend in backends)
    for name in compat.PINNED:
        module, function = name.split(":")
        if module.endswith(".torch_native_backend"):
            assert inspect.getsource(_resolve(released, function)) == inspect.getsource(_resolve(patched, function))


def _resolve(module: ModuleType, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
