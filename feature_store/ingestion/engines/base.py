"""What an ingest asks of an engine. DuckDB answers on one machine, Spark on many; both give the same store."""

from __future__ import annotations

from typing import Protocol

import pyarrow as pa

from elastic_rec.feature_store.table.format import HistoryFile, SourceFile
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.staging import LocalStaging, RemoteStaging
from elastic_rec.feature_store.table.vocabulary import Vocabulary


class IngestEngine(Protocol):
    """A context manager. Its methods are called in the order in which they stand here.

    A role is "user", "item", "timestamp", "event_id" or the name of a context column.
    """

    def __enter__(self) -> IngestEngine: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None: ...

    def load_inputs(self, paths: list[Location], *, format: str, columns: dict[str, str]) -> list[SourceFile]:
        """Stages all files in order; one entry for each.

        columns: role -> input column. Raises DataError for a file or row that a check with policy fail refuses.
        """

    def clean(self) -> dict[str, int]:
        """Drops what fails a check with policy drop. Returns how many events failed each check, but for out_of_order
        and gaps that are kept: OrderWatch counts those."""

    def select(
        self,
        *,
        min_user_events: int = 1,
        min_item_events: int = 1,
        max_history: int = 0,
        times: tuple[int | None, int | None] = (None, None),
        min_vocabulary_count: int = 1,
    ) -> dict[str, int]:
        """Drops events outside [times), of rare items, then of users left with too few events, then all but the newest
        max_history of a user (0: none). Then numbers the ids that are left.

        One pass, not a k-core: an item may fall below its minimum again because its users were dropped.
        Returns counts of events, users and items before and after.
        """

    def id_type(self, role: str) -> str | None:
        """ "int64" or "string", None where the log has no such column; known after select()."""

    def vocabulary(self, role: str) -> Vocabulary:
        """Of a role with one; after select()."""

    def write(
        self, staging: LocalStaging | RemoteStaging, *, num_buckets: int, schema: pa.Schema, row_group_events: int
    ) -> tuple[list[HistoryFile], dict[str, int]]:
        """Kept events -> data files, sorted by bucket, user, timestamp, event_id and input order, ids of item and
        context as vocabulary indices. Returns what write_sorted does."""
