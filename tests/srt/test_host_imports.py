"""What is given back once everything has been imported."""

from __future__ import annotations

from batchllm.srt.platforms.host_imports import _clean_mappings

_SMAPS = """\
1000-3000 r-xp 00000000 fe:00 17 /usr/lib/libx.so
Size:                  8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me
3000-4000 r--p 00002000 fe:00 17 /usr/lib/libx.so
Size:                  4 kB
Anonymous:             4 kB
4000-5000 rw-p 00003000 fe:00 17 /usr/lib/libx.so
Size:                  4 kB
Anonymous:             0 kB
5000-6000 r--s 00000000 fe:00 18 /dev/shm/shared
Size:                  4 kB
Anonymous:             0 kB
6000-7000 r--p 00000000 00:00 0 [vdso]
Size:                  4 kB
Anonymous:             0 kB
"""


def test_only_mappings_that_hold_nothing_but_a_file_are_given_back() -> None:
    """Not relocated ones, nor those that may be written, are shared, or have no file."""
    assert _clean_mappings(_SMAPS) == [(0x1000, 0x2000)]
