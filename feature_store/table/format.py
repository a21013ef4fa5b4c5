"""The format of manifests: the dataclasses are the JSON of the files, key for key and in this order (typed_json.py).

`hash` covers all the rest, file digests included: two tables with one
hash hold the same bytes. No date and no path of the store itself is inside: the same input gives the same manifest.

The hash tells an accident. It has no key, so it does not tell a stranger's hand: the kinds of values, and
Manifest.check, do. No path leads out of the store's folder, and counts add up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from elastic_rec.feature_store.table.own_files import DATA_FILE, ITEMS_FILE, VOCABULARY_FILE
from elastic_rec.feature_store.table.schema import ARROW_TYPES, UNITS_PER_SECOND
from elastic_rec.feature_store.table.vocabulary import FIRST
from elastic_rec.feature_store.utils.typed_json import ABSENT, Fail


def _are_pairs(groups: list) -> bool:
    return all(isinstance(pair, list) and list(map(type, pair)) == [int, int] and min(pair) >= 0 for pair in groups)


Count = Annotated[int, lambda value: value >= 0]
Digest = Annotated[str, re.compile(r"[0-9a-f]{64}").fullmatch]
Size = Annotated[int, lambda value: value >= FIRST]
Unit = Annotated[str, UNITS_PER_SECOND.__contains__]
Percentiles = Annotated[list[int], lambda times: len(times) == 101]
IdType = Annotated[str, ARROW_TYPES.__contains__]
RowGroups = Annotated[list, _are_pairs]  # [[rows, what they hold], ...]


@dataclass(frozen=True, kw_only=True)
class NamedFile:
    """path: within the folder of the manifest. sha256: of its content."""

    path: str
    bytes: Count
    sha256: Digest


@dataclass(frozen=True, kw_only=True)
class VocabularyFile:
    """size: rows that an embedding table needs. type: of the ids; kept for histories only."""

    size: Size
    type: IdType | None = None
    path: str
    bytes: Count
    sha256: Digest


class DataFile:
    """COUNTS: fields with the number of rows, and of what they hold. footer: sha256 of the Parquet footer, which has no
    checksum of its own as the pages have; None in stores from before that was kept."""

    COUNTS: ClassVar[tuple[str, str]]
    path: str
    footer: str | None
    row_groups: list[list[int]]

    @property
    def bucket(self) -> int:
        """-1 where the path is none of a data file."""
        match = DATA_FILE.fullmatch(self.path)
        return int(match[1]) if match else -1


@dataclass(frozen=True, kw_only=True)
class HistoryFile(DataFile):
    """The users of one bucket. min_time, max_time: in the store's unit."""

    COUNTS = ("num_users", "num_events")
    path: str
    bytes: Count
    sha256: Digest
    footer: Digest | None = None
    num_users: Count
    num_events: Count
    row_groups: RowGroups
    min_time: int
    max_time: int


@dataclass(frozen=True, kw_only=True)
class ImpressionFile(DataFile):
    """The impressions of one bucket."""

    COUNTS = ("num_impressions", "num_candidates")
    stored_bucket: Count = field(metadata={"json": "bucket"})
    path: str
    row_groups: RowGroups
    bytes: Count
    sha256: Digest
    footer: Digest | None = None
    num_impressions: Count
    num_candidates: Count


@dataclass(frozen=True, kw_only=True)
class HistorySchema:
    """Types of the stored columns by name, "int64" or "string"; events: of the leaves of an event."""

    user_id: IdType
    events: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """An input file. version: of the store, that its events came with. sha256: an append knows its bytes by it."""

    path: str
    format: str | None = None
    bytes: Count | None = None
    sha256: Digest | None = None
    events: Count = 0
    version: Count = field(default=0, metadata={"json": "generation"})


@dataclass(frozen=True, kw_only=True)
class Source:
    """columns: role -> column of the input."""

    columns: dict[str, str]
    files: list[SourceFile]


@dataclass(frozen=True, kw_only=True)
class ItemIds:
    """The item ids that impressions were written with: digest of those of the indices below `size`."""

    size: Count
    sha256: Digest


class Manifest:
    """What the manifests of both tables have. FORMAT, TABLE: its names in the file and in messages."""

    FORMAT: ClassVar[str]
    TABLE: ClassVar[str]
    REMEDY: ClassVar[str]
    num_buckets: int
    files: list
    vocabularies: dict[str, VocabularyFile]
    items: NamedFile | None = None

    def named_files(self) -> list:
        """Entries of all files that the manifest names."""
        return [*self.files, *self.vocabularies.values(), *([self.items] if self.items else [])]

    def check(self, fail: Fail) -> None:
        """Calls fail(place, value) where no ingest could have written this."""
        if self.num_buckets < 1:
            fail("num_buckets", self.num_buckets)
        buckets: set[int] = set()
        for number, file in enumerate(self.files):
            if not 0 <= file.bucket < self.num_buckets or file.bucket in buckets:
                fail(f"files.{number}.path", file.path)
            buckets.add(file.bucket)
            for at, name in enumerate(file.COUNTS):
                if getattr(file, name) != sum(group[at] for group in file.row_groups):
                    fail(f"files.{number}.{name}", getattr(file, name))
        for name in type(self).COUNTS:
            if getattr(self, name) != sum(getattr(file, name) for file in self.files):
                fail(name, getattr(self, name))
        for column, entry in self.vocabularies.items():
            match = VOCABULARY_FILE.fullmatch(entry.path)
            if not match or match[1] != column:
                fail(f"vocabularies.{column}.path", entry.path)
        if self.items and not ITEMS_FILE.fullmatch(self.items.path):
            fail("items.path", self.items.path)
        paths = [entry.path for entry in self.named_files()]
        if len(set(paths)) < len(paths):
            fail("files", paths)

    def _check_columns(self, columns: list[str], fail: Fail) -> None:
        for column in columns:
            if column not in self.vocabularies:
                fail(f"vocabularies.{column}", ABSENT)


@dataclass(frozen=True, kw_only=True)
class HistoryManifest(Manifest):
    """The histories of a store. version: counts appends. parent: hash of the version before. checks: what was found in
    the events that came with this version (ingestion/checks.py)."""

    FORMAT, TABLE, REMEDY = "elastic-rec-history-store", "a history store", "run the ingest again"
    COUNTS = HistoryFile.COUNTS
    version: Count = field(default=0, metadata={"json": "generation"})
    name: str = ""
    time_unit: Unit
    num_users: Count
    num_events: Count
    num_buckets: int
    row_group_events: Count | None = None
    bucket_hash: str = ""
    schema: HistorySchema
    files: list[HistoryFile]
    vocabularies: dict[str, VocabularyFile]
    source: Source
    filters: dict
    checks: dict | None = None
    parent: Digest | None = None
    hash: str = field(default="", metadata={"json": ""})

    def check(self, fail: Fail) -> None:
        """As Manifest.check; users and items have vocabularies, and all of these a type."""
        super().check(fail)
        self._check_columns(["user", "item"], fail)
        for column, entry in self.vocabularies.items():
            if entry.type is None:
                fail(f"vocabularies.{column}.type", ABSENT)


@dataclass(frozen=True, kw_only=True)
class ImpressionManifest(Manifest):
    """The impressions of a store. store: hash of the histories that they were written with. items: attributes, one row
    per item index. labels, context, item_context: column names. time_percentiles: 101 times in the store's unit."""

    FORMAT, TABLE = "elastic-rec-impressions", "the impressions of a store"
    REMEDY = "ingest the impressions again (ingest.py impressions)"
    COUNTS = ImpressionFile.COUNTS
    store: Digest
    num_buckets: int
    time_unit: Unit
    time_percentiles: Percentiles
    item_ids: ItemIds
    num_impressions: Count
    num_candidates: Count
    num_unknown_candidates: Count
    labels: list[str]
    context: list[str]
    item_context: list[str]
    files: list[ImpressionFile]
    vocabularies: dict[str, VocabularyFile]
    items: NamedFile | None = field()
    source: list[dict]
    hash: str = field(default="", metadata={"json": ""})

    def check(self, fail: Fail) -> None:
        """As Manifest.check; every context column has a vocabulary."""
        super().check(fail)
        self._check_columns([*self.context, *self.item_context], fail)
