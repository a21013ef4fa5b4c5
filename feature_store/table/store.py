"""A finished history store on disk: what is in it, its vocabularies, its users."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.table.footer import read_footer
from elastic_rec.feature_store.table.format import HistoryManifest
from elastic_rec.feature_store.table.location import Location, open_location
from elastic_rec.feature_store.table.manifest import check_digest, read_manifest
from elastic_rec.feature_store.table.schema import ARROW_TYPES, UNITS_PER_SECOND, USER
from elastic_rec.feature_store.table.vocabulary import Vocabulary
from elastic_rec.feature_store.utils.errors import DAMAGED, DataError

BROKEN = (pa.ArrowException, OSError, ValueError)  # what PyArrow raises for a file that is missing or damaged


@dataclass(frozen=True)
class StoreFile:
    """One data file. first_row: row number of its first user; row_groups: (num_users, num_events) each.

    footer: digest of its Parquet footer; None in stores from before that was kept.
    """

    path: Location
    first_row: int
    num_users: int
    num_events: int
    row_groups: tuple[tuple[int, int], ...]
    sha256: str
    footer: str | None

    def open(self) -> pq.ParquetFile:
        """Opens the Parquet file; DataError where its footer is not the one that ingest wrote."""
        return open_data_file(self.path, self.footer)

    @property
    def bucket(self) -> int:
        """Number of the bucket whose users it holds."""
        return int(self.path.parent.name.removeprefix("bucket="))


class Store:
    """Users have row numbers 0..num_users-1, counted through `files` in order."""

    def __init__(self, path: Location, manifest: HistoryManifest) -> None:
        self.path = path
        self.manifest = manifest
        self.version: int = manifest.version
        self.num_users: int = manifest.num_users
        self.num_events: int = manifest.num_events
        self.time_unit: str = manifest.time_unit
        self.columns: list[str] = [name for name in manifest.vocabularies if name != "user"]
        self.files = _list_files(path, manifest)
        self._vocabularies: dict[str, Vocabulary] = {}

    @classmethod
    def open(cls, path: str | os.PathLike | Location, *, version: int | None = None) -> Store:
        """Reads the manifest of a version (None: the current one), checks its hash and each file's size.

        path: a folder, or a URL (location.py).
        DataError where the store is not whole. What is opened stays as it is, whatever is appended later.
        """
        path = open_location(path)
        return cls(path, read_manifest(path, version))

    def time_range_s(self) -> tuple[int, int]:
        """Whole seconds of the oldest and of the newest event."""
        unit, files = UNITS_PER_SECOND[self.time_unit], self.manifest.files
        return min(file.min_time for file in files) // unit, max(file.max_time for file in files) // unit

    def verify(self) -> None:
        """Reads every byte and compares digests with the manifest's; DataError names the first file that differs."""
        for entry in self.manifest.named_files():
            check_digest(self.path / entry.path, entry.sha256)

    def vocabulary(self, column: str) -> Vocabulary:
        """Vocabulary of an event column, or of "user"; read once."""
        if column not in self._vocabularies:
            self.check_columns([column], also=["user"])
            entry = self.manifest.vocabularies[column]
            check_digest(self.path / entry.path, entry.sha256)
            self._vocabularies[column] = Vocabulary.read(self.path / entry.path, column=column)
        return self._vocabularies[column]

    def check_columns(self, columns: list[str], *, also: list[str] | None = None) -> None:
        """DataError for a name that is no event column, and not among `also`."""
        known = [*self.columns, *(also or [])]
        for column in columns:
            if column not in known:
                raise DataError(f"{self.path}: no event column '{column}'; the store has: {', '.join(known)}")

    def user_ids(self, rows: np.ndarray) -> pa.Array:
        """Row numbers (any order, -1 for padding) -> raw user ids, null for padding.

        Reads only the row groups that occur.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < -1 or rows.max() >= self.num_users):
            raise DataError(
                f"{self.path}: rows {rows.min()}..{rows.max()} asked for, users are 0..{self.num_users - 1}"
            )
        parts, first_rows, bases, taken = [], [], [], 0
        for file in self.files:
            wanted = rows[(rows >= file.first_row) & (rows < file.first_row + file.num_users)]
            if not len(wanted):
                continue
            edges = file.first_row + np.cumsum([0, *(users for users, _ in file.row_groups)])
            groups = np.unique(np.searchsorted(edges, wanted, side="right") - 1)
            part = read_row_groups(file.open(), groups.tolist(), [USER], file.path)[USER]
            parts += part.chunks
            for group in groups:
                first_rows.append(edges[group])
                bases.append(taken)
                taken += file.row_groups[group][0]
        user_type = ARROW_TYPES[self.manifest.schema.user_id]
        if not parts:
            return pa.nulls(len(rows), user_type)
        group = np.searchsorted(np.array(first_rows), rows, side="right") - 1
        positions = rows - np.array(first_rows)[group] + np.array(bases)[group]
        return pa.chunked_array(parts).combine_chunks().take(pa.array(positions, mask=rows < 0))


def open_data_file(path: Location, footer: str | None = None) -> pq.ParquetFile:
    """footer: the digest that the file's footer must have; None: it is not checked."""
    try:
        file, metadata = path.open(), None
        if footer is not None:
            content = read_footer(file)
            if hashlib.sha256(content).hexdigest() != footer:
                raise DataError("its footer is not the one that ingest wrote")
            metadata = pq.read_metadata(pa.BufferReader(content))
        remote = not path.is_local
        return pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True, pre_buffer=remote)
    except (*BROKEN, DataError) as error:
        raise DataError(
            f"{path}: cannot be opened ({error}); it was changed or damaged, or its version was deleted by a "
            "vacuum, or the store was overwritten: open the store again"
        ) from error


def read_row_groups(file: pq.ParquetFile, groups: list[int], columns: list[str], path: Location) -> pa.Table:
    """file.read_row_groups; what cannot be decoded (a flipped bit, a hole) is a DataError with the file's name."""
    try:
        table = file.read_row_groups(groups, columns=columns, use_threads=False)
    except BROKEN as error:
        raise DataError(f"{path}: row groups {groups} cannot be decoded ({error}); {DAMAGED}") from error
    expected = sum(file.metadata.row_group(group).num_rows for group in groups)
    if len(table) != expected:  # a page whose header is damaged may be passed over
        raise DataError(f"{path}: row groups {groups} have {len(table)} rows, not {expected}; {DAMAGED}")
    return table


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """Without a copy where there is one chunk."""
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.nulls(0, column.type)])


def _list_files(root: Location, manifest: HistoryManifest) -> list[StoreFile]:
    files, row = [], 0
    for entry in manifest.files:
        groups = tuple((users, events) for users, events in entry.row_groups)
        counts = entry.num_users, entry.num_events
        files.append(StoreFile(root / entry.path, row, *counts, groups, entry.sha256, entry.footer))
        row += entry.num_users
    return files


def first_users(store: Store) -> dict[int, list]:
    """Bucket -> the first user id of each row group of its histories, from the files' footers."""
    firsts = {}
    for file in store.files:
        metadata = file.open().metadata
        column = metadata.schema.names.index(USER)
        groups = (metadata.row_group(number).column(column) for number in range(metadata.num_row_groups))
        firsts[file.bucket] = [group.statistics.min for group in groups]
    return firsts
