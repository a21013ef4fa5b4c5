"""DuckDB's part of an append: new events beside those of a store, in one sort.

    new files --load--> raw --drop_known--> raw --fold--> vocabularies that keep every old index
    raw + old histories of the touched buckets, taken apart --merged_batches--> as after one ingest of everything

Old events go before new ones of equal (timestamp, event_id), in the order they have: the tie-break of an ingest whose
input lists the older files first.
"""

from __future__ import annotations

import glob
from pathlib import Path

import pyarrow as pa

from elastic_rec.feature_store.ingestion.checks import BEFORE_ALL_INPUT, SEQ, ChecksConfig, Policy
from elastic_rec.feature_store.ingestion.engines.duckdb import DuckEngine
from elastic_rec.feature_store.ingestion.sources import quote
from elastic_rec.feature_store.table.manifest import check_digest
from elastic_rec.feature_store.table.schema import EVENT_ID, EVENTS, TIMESTAMP, USER
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError


class MergeEngine(DuckEngine):
    """A DuckEngine over the new events of `base`. After load() and clean(): adopt_types, then from the top down."""

    def __init__(
        self, *, base: Store, work: Path, roles: list[str], memory_limit: str, threads: int, checks: ChecksConfig
    ) -> None:
        settings = {"memory_limit": memory_limit, "threads": threads, "checks": checks}
        super().__init__(work=work, roles=roles, unit=base.time_unit, **settings)
        self._base = base
        self._num_buckets = base.manifest.num_buckets

    def adopt_types(self) -> None:
        """Ids get the types of the store; DataError where the new ones do not fit them."""
        self._types = {role: entry.type for role, entry in self._base.manifest.vocabularies.items()}
        if EVENT_ID in self._roles:
            self._types[EVENT_ID] = self._base.manifest.schema.events[EVENT_ID]
        for role, type in self._types.items():
            if type == "string" and self._kinds[role] == "int64":
                raise DataError(f"input has int64 in {role}, {self._base.path} has strings there; write it as text")
            wrong = self._not_an_integer(role) if type == "int64" and self._kinds[role] == "text" else None
            if wrong is not None:
                raise DataError(
                    f"input has {role} {wrong!r}, but {self._base.path} holds integers there; drop such rows, or "
                    "ingest everything anew"
                )

    def touched_buckets(self) -> set[int]:
        """Buckets of the users who have staged events."""
        bucket = self._bucket(self._value("user"), self._num_buckets)
        return {bucket for (bucket,) in self._run(f"SELECT DISTINCT {bucket} FROM raw")}

    def drop_known(self, files: list[Path]) -> int:
        """Drops new events that `files` of the store hold (user, timestamp and event_id); returns how many went."""
        if EVENT_ID not in self._roles or not files or self._checks.duplicates is Policy.keep:
            return 0
        dropped = self._delete(
            f"SELECT raw.rowid FROM raw JOIN ({_old_events(files)}) old ON "
            f"old.{USER} = {self._value('user')} AND old.event.{TIMESTAMP} = raw.timestamp "
            f"AND old.event.{EVENT_ID} = {self._value('event_id')}"
        )
        if dropped and self._checks.duplicates is Policy.fail:
            raise DataError(
                f"{dropped} events are in {self._base.path} already (same user, time and event id); nothing was "
                "appended, set checks.duplicates=drop or keep"
            )
        return dropped

    def fold(self, *, min_vocabulary_count: int = 1) -> dict[str, int]:
        """Makes the vocabularies of the new version: old indices stay, counts grow, new ids follow by count, then
        id, if they have min_vocabulary_count events here (users always). Returns counts of new events, users and items,
        and of users and items in all."""
        figures = {"appended_events": self._one("SELECT count(*) FROM raw")}
        for role in self._indexed:
            entry = self._base.manifest.vocabularies[role]
            least = 1 if role == "user" else min_vocabulary_count
            stored = self._base.path / entry.path
            path = stored.fetch(self._work / "vocab")
            check_digest(stored, entry.sha256, copy=path)  # as of data files: no flipped bit under a fresh digest
            old = f"read_parquet({_list([path])}, hive_partitioning=false)"
            self._run(
                f'CREATE TABLE counted AS SELECT "{role}" AS raw_id, {self._value(role)} AS id, count(*) AS n '
                f'FROM raw WHERE "{role}" IS NOT NULL GROUP BY raw_id'
            )
            self._run(
                f'CREATE TABLE "vocab_{role}" AS '
                'SELECT raw_id, old.id, old."count" + coalesce(n, 0) AS n, old."index" AS idx '
                f"FROM {old} old LEFT JOIN counted USING (id) UNION ALL "
                f"SELECT raw_id, id, n, row_number() OVER (ORDER BY n DESC, id) + {entry.size - 1} AS idx "
                f"FROM counted ANTI JOIN {old} old USING (id) WHERE n >= {least}"
            )
            self._run("DROP TABLE counted")
            if role in ("user", "item"):
                size = self._one(f'SELECT count(*) FROM "vocab_{role}"')
                figures |= {f"{role}s": size, f"new_{role}s": size + 2 - entry.size}
        return figures

    def merged_batches(self, files: list[Path]) -> pa.RecordBatchReader:
        """The new events and those of `files` of the store, sorted as for write_sorted."""
        new = self._new_events(self._num_buckets)
        if not files:
            return self._sorted(new)
        leaves = ", ".join(f'event."{leaf}"' for leaf in self._base.manifest.schema.events)
        old = (
            f"SELECT {self._bucket(USER, self._num_buckets)} AS bucket, {USER}, {leaves}, "
            f"place + {BEFORE_ALL_INPUT} AS {SEQ} FROM ({_old_events(files)})"
        )
        return self._sorted(f"{old} UNION ALL {new}")


def _old_events(files: list[Path]) -> str:
    """SQL of stored histories taken apart: (user_id, event struct, place in the history)."""
    return (
        f"SELECT {USER}, unnest({EVENTS}) AS event, unnest(range(len({EVENTS}))) AS place "
        f"FROM read_parquet({_list(files)}, hive_partitioning=false)"
    )


def _list(files: list[Path]) -> str:
    return "[" + ", ".join(quote(glob.escape(str(path))) for path in files) + "]"
