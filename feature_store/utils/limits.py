"""Limits on what a small file may claim to be: what grows a thousandfold when it is read fills a disk or memory."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import BinaryIO

import pyarrow.parquet as pq

from elastic_rec.feature_store.utils.errors import DataError

MOST_ROWS_PER_BYTE = 1000  # a row of two constant columns takes more
BLOCK_BYTES = 1 << 20
# Logs and tables shrink 3- to 50-fold. Deflate reaches 1,032-fold, on nothing but repetition.
MOST_GROWTH = 200
ALWAYS_BYTES = 256 << 20  # so much is no danger, however well it is packed


def check_growth(name: str | Path, *, packed_bytes: int, unpacked_bytes: int) -> None:
    """DataError where unpacking makes too much of too little."""
    if unpacked_bytes > max(ALWAYS_BYTES, MOST_GROWTH * packed_bytes):
        raise DataError(
            f"{name}: {packed_bytes:,} bytes unpack to {unpacked_bytes:,} or more, over {MOST_GROWTH}-fold: refused. "
            "If you trust it, unpack it yourself and give the result"
        )


def check_zip(archive: zipfile.ZipFile, name: str | Path) -> None:
    """The same for each member; zipfile reads no more of one than it claims."""
    for member in archive.infolist():
        check_growth(f"{name}: {member.filename}", packed_bytes=member.compress_size, unpacked_bytes=member.file_size)


def copy_unpacked(source: BinaryIO, target: BinaryIO, *, name: str | Path, packed_bytes: int) -> None:
    """Copies an unpacking stream, no farther than check_growth allows."""
    unpacked_bytes = 0
    while block := source.read(BLOCK_BYTES):
        unpacked_bytes += len(block)
        check_growth(name, packed_bytes=packed_bytes, unpacked_bytes=unpacked_bytes)
        target.write(block)


def check_footer(name: str | Path, footer: pq.FileMetaData, *, size_bytes: int) -> None:
    """DataError for a Parquet footer that cannot be true, before anything is made as large as it says."""
    claimed, groups = footer.num_rows, [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if min([claimed, *groups]) < 0 or claimed > size_bytes * MOST_ROWS_PER_BYTE or claimed != sum(groups):
        raise DataError(
            f"{name} says that it has {claimed:,} rows in {size_bytes:,} bytes, and row groups of {groups[:3]}: its "
            "footer is damaged, write the file again"
        )
