"""Parquet footers: what says where the pages of a file are. Pages have checksums of their own, footers have none.

PAR1 | pages | footer | its length, 4 bytes | PAR1
"""

from __future__ import annotations

import hashlib

import pyarrow as pa

from elastic_rec.feature_store.utils.errors import DataError

_END = 8
_MAGIC = b"PAR1"


def read_footer(file: pa.NativeFile) -> bytes:
    """The footer with its length and the magic, as they stand at the end. DataError where there is none."""
    size = file.size()
    end = file.read_at(min(size, _END), max(0, size - _END))
    length = int.from_bytes(end[:4], "little") + _END
    if end[4:] != _MAGIC or length > size:
        raise DataError("has no Parquet footer; truncated or changed")
    return file.read_at(length, size - length)


def footer_digest(file: pa.NativeFile) -> str:
    """sha256 of read_footer(file), hexadecimal."""
    return hashlib.sha256(read_footer(file)).hexdigest()
