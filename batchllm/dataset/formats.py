"""What a file is, told by its first bytes, whatever its name.

Knows magic numbers; not how what they stand for is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

HEAD_LEN = 512
"""First bytes that are looked at."""

COMPRESSIONS: Mapping[bytes, str] = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    **{bytes([low]) + b"\x2a\x4d\x18": "zstd" for low in range(0x50, 0x60)},  # frames to be skipped
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x04\x22\x4d\x18": "lz4",
}
ENCODINGS: Mapping[bytes, str] = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
    b"{\x00": "utf-16-le",
    b"\x00{": "utf-16-be",
    b"[\x00": "utf-16-le",
    b"\x00[": "utf-16-be",
}
"""First bytes of JSON in other encodings than UTF-8; the longer come first."""
TABLES: Mapping[bytes, str] = {b"PAR1": "parquet", b"ARROW1": "hf", b"\xff\xff\xff\xff": "hf"}
_OTHERS: Mapping[bytes, str] = {
    b"PK\x03\x04": "a ZIP archive (or what is made of one: .xlsx, .docx, .npz)",
    b"PK\x05\x06": "a ZIP archive without files",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x80\x02": "a Python pickle",
    b"\x80\x03": "a Python pickle",
    b"\x80\x04": "a Python pickle",
    b"\x80\x05": "a Python pickle",
    b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "an HDF5 file",
    b"FEA1": "a Feather file of version 1",
    b"PARE": "an encrypted Parquet file",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"\xff\x06\x00\x00sNaPpY": "compressed with snappy",
    b"\x1f\x9d": "compressed with compress",
    b"LZIP": "compressed with lzip",
    b"\x1f\xa0": "compressed with compress",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x7fELF": "a program",
    b"GGUF": "a model",
    b"<": "HTML or XML",
}
_TAR_AT, _TAR = 257, b"ustar"


class Format(NamedTuple):
    """What the first bytes say.

    Attributes:
        kind: ``lines`` for JSON, ``compressed``, ``encoded``, ``table``, ``csv``, ``other``.
        name: The compression, the encoding, ``parquet`` or ``hf``; for others what they are, in words.
    """

    kind: str
    name: str = ""


def tell_format(head: bytes) -> Format:
    """What begins with these bytes.

    Args:
        head: `HEAD_LEN` of them, or as many as there are.
    """
    for kind, magics in (("compressed", COMPRESSIONS), ("table", TABLES), ("encoded", ENCODINGS)):
        for magic, name in magics.items():
            if head.startswith(magic):
                return Format(kind, name)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head[_TAR_AT:].startswith(_TAR):
        return Format("other", "a tar archive")
    for magic, name in _OTHERS.items():
        if head.startswith(magic) or (magic == b"<" and text.startswith(magic)):
            return Format("other", name)
    return Format("csv" if _looks_like_csv(text) else "lines")


def _looks_like_csv(text: bytes) -> bool:
    """A first line of names between commas or tabs."""
    line = text.split(b"\n", 1)[0].rstrip(b"\r")
    names = [name.strip(b'" ') for name in line.split(b"\t" if b"\t" in line else b",")]
    return len(names) > 1 and all(name.replace(b"_", b"a").replace(b" ", b"a").isalnum() for name in names)
