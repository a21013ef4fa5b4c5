"""DuckDB's part of an ingest: stage, validate, filter, index and sort events under a memory limit.

Every file is inserted into one staging table in input order. DuckDB keeps insertion order (also when it parses a file
in parallel), so rowid IS "file number, row number", the tie-break of the sort. All passes but the first read the
staging table, on disk beside the future store, and never parse text again.
"""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa

from elastic_rec.feature_store.ingestion.checks import ID_ROLES, NULL_WORDS, SEQ, ChecksConfig, Policy, duplicates_found
from elastic_rec.feature_store.ingestion.engines.session import SQL_TYPES, DuckSession, bucket_sql
from elastic_rec.feature_store.ingestion.file_clock import FileClock, clock_fault, clock_sql
from elastic_rec.feature_store.ingestion.inputs import check_entries
from elastic_rec.feature_store.ingestion.sources import Source, check_same_kinds, open_source
from elastic_rec.feature_store.ingestion.time_columns import MOMENTS, time_fault, time_sql, time_text_sql
from elastic_rec.feature_store.ingestion.writer import write_sorted
from elastic_rec.feature_store.table.format import HistoryFile, SourceFile
from elastic_rec.feature_store.table.location import Location, open_location
from elastic_rec.feature_store.table.staging import LocalStaging, RemoteStaging
from elastic_rec.feature_store.table.times import unit_advice
from elastic_rec.feature_store.table.vocabulary import FIRST, UNKNOWN, Vocabulary
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.progress import progress


class DuckEngine(DuckSession):
    """roles: "user", "item", "timestamp", optionally "event_id", and one per context column (its own name)."""

    def __init__(
        self, *, work: Path, roles: list[str], unit: str, memory_limit: str, threads: int, checks: ChecksConfig
    ) -> None:
        super().__init__(work, memory_limit=memory_limit, threads=threads)
        self._roles = roles
        self._unit = unit
        self._checks = checks
        self._num_loaded = 0
        self._indexed = [r for r in roles if r not in ("timestamp", "event_id")]
        self._kinds: dict[str, str] = {}

    def load_inputs(self, paths: list[Location], *, format: str, columns: dict[str, str]) -> list[SourceFile]:
        """As IngestEngine.load_inputs."""
        bar = progress("read", total=len(paths), unit=" files")
        entries = []
        for path in paths:
            entries.append(self.load_input(path, format=format, columns=columns))
            bar.update(1)
        bar.close()
        check_entries(entries)
        return entries

    def load_input(self, path: Location, *, format: str, columns: dict[str, str]) -> SourceFile:
        """One file of load_inputs. A file that is not on the local disk is copied there while it is read."""
        self._is_typed = format == "parquet"
        with self._local(path) as local:
            source = open_source(path, local, format=format, columns=columns, work=self._work)
            # What an append knows an input by: its bytes, not its name.
            about = {"format": format, "bytes": local.stat().st_size, "sha256": open_location(local).digest()}
            return SourceFile(path=str(path), **about, events=self._load(source))

    def expect_kinds(self, kinds: dict[str, str], *, first: str) -> None:
        """Before the first file: what its columns have to be, as they are in `first`, which is read elsewhere."""
        self._kinds, self._first = kinds, first
        self._conditions = self._checks.row_conditions({role: kinds[role] for role in self._roles}, self._unit)
        self._found = dict.fromkeys([*self._conditions, "wrong_clock"], 0)
        columns = (f'"{r}" {"BIGINT" if r == "timestamp" or kinds[r] == "int64" else "VARCHAR"}' for r in self._roles)
        self._run(f"CREATE TABLE raw ({', '.join(columns)})")

    def _load(self, source: Source) -> int:
        """Appends one file's events to the staging table. Returns their number; DataError names the first row that
        fails a check whose policy is fail."""
        if source.is_empty:
            return 0
        if not self._kinds:
            self.expect_kinds(source.kinds, first=str(source.path))
        check_same_kinds(source, self._kinds, self._first)
        with self._reading(source.path, has_quotes=source.quoted is not None):
            count = self._insert(source)
        self._check(source, count)
        self._num_loaded += count
        return count

    def _insert(self, source: Source) -> int:
        values = ", ".join(self._staged_sql(source, role) for role in self._roles)
        try:
            return self._one(f"INSERT INTO raw SELECT {values} FROM {source.scan}")
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error:
            num_rows = source.quoted.num_rows() if source.quoted else None
            if num_rows is None or self._one(f"SELECT count(*) FROM {source.quoted.scan}") != num_rows:
                raise
            return self._one(f"INSERT INTO raw SELECT {values} FROM {source.quoted.scan}")

    def _check(self, source: Source, count: int) -> None:
        """Counts the last `count` rows, those of source, that fail a check."""
        these = f"FROM raw WHERE rowid >= {self._num_loaded}"  # nothing is deleted before clean(): no rowid has moved
        counted = ", ".join(f"count(*) FILTER ({condition})" for condition in self._conditions.values())
        latest = self._checks.latest(self._unit)
        (figures,) = self._run(f"SELECT {counted}, {clock_sql(latest)} {these}")
        found = dict(zip(self._conditions, figures, strict=False))
        for name, number in found.items():
            self._found[name] += number
        failed = [name for name in self._checks.named(Policy.fail) if found.get(name)]
        if failed:
            bad = " OR ".join(f"({self._conditions[name]})" for name in failed)
            row = self._one(f"SELECT min(rowid) {these} AND ({bad})") - self._num_loaded
            (why,) = self._run(
                f"SELECT {', '.join(self._conditions[name] for name in failed)} FROM raw "
                f"WHERE rowid = {self._num_loaded + row}"
            )
            check = failed[why.index(True)]
            self._explain(source, row=row, check=check, more=found[check] - 1)
        self._check_clock(source, FileClock(*figures[len(found) :]), f"{these} AND timestamp <= {latest}")

    def _check_clock(self, source: Source, clock: FileClock, rows: str) -> None:
        def count_where(condition: str) -> int:
            return self._one(f"SELECT count(*) {rows} AND ({condition})")

        fault = clock_fault(clock, self._unit, source.kinds["timestamp"], count_where)
        if fault is None:
            return
        if self._checks.wrong_clock is Policy.fail:
            raise DataError(
                f"{source.path}: {clock.count} timestamps are read in timestamp_unit={self._unit}: {fault}. If they "
                "are right, set checks.wrong_clock=keep"
            )
        self._found["wrong_clock"] += clock.count

    def drop_bad_rows(self) -> dict[str, int]:
        """After the last load: drops what fails a check that one row decides and whose policy is drop. Returns how many
        events failed each."""
        drop = [self._conditions[name] for name in self._checks.named(Policy.drop) if self._found.get(name)]
        if drop:
            self._one(f"DELETE FROM raw WHERE {' OR '.join(f'({condition})' for condition in drop)}")
        return dict(self._found)

    def clean(self) -> dict[str, int]:
        """After the last load: drops what fails a check whose policy is drop. Returns how many events failed each,
        but for out_of_order and gaps that are kept (OrderWatch counts those)."""
        found = self.drop_bad_rows()
        found["duplicates"] = self._duplicates()
        if self._checks.out_of_order is Policy.drop:
            found["out_of_order"] = self._delete(
                'SELECT id FROM (SELECT rowid AS id, timestamp, max(timestamp) OVER (PARTITION BY "user" '
                "ORDER BY rowid ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS newest FROM raw) "
                "WHERE timestamp < newest"
            )
        if self._checks.gaps is Policy.drop:
            found["gaps"] = self._delete(
                'SELECT raw.rowid FROM raw JOIN (SELECT "user", max(timestamp) AS until FROM (SELECT "user", '
                'timestamp, lead(timestamp) OVER (PARTITION BY "user" ORDER BY timestamp) AS next FROM raw) '
                f'WHERE next - timestamp > {self._checks.max_gap(self._unit)} GROUP BY "user") gap USING ("user") '
                "WHERE raw.timestamp <= gap.until"
            )
        return found

    def _delete(self, rowids: str) -> int:
        return self._one(f"DELETE FROM raw WHERE rowid IN ({rowids})")

    def _duplicates(self) -> int:
        """Events behind the first one with their user, timestamp and event_id. None where the log has no event_id: two
        equal events may both have happened. These are neighbours in the store's order, so an event_id need only be
        unique within its user and time."""
        if "event_id" not in self._roles:
            return 0
        key = '"user", timestamp, event_id'
        twice = (
            f"FROM raw JOIN (SELECT {key}, min(rowid) AS first FROM raw GROUP BY {key} HAVING count(*) > 1) twice "
            f"USING ({key}) WHERE raw.rowid > twice.first"
        )
        if self._checks.duplicates is Policy.drop:
            return self._delete(f"SELECT raw.rowid {twice}")
        count = self._one(f"SELECT count(*) {twice}")
        if count and self._checks.duplicates is Policy.fail:
            (example,) = self._run(f'SELECT raw."user", raw.timestamp, raw.event_id {twice} ORDER BY raw.rowid LIMIT 1')
            raise duplicates_found(count, *example)
        return count

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
        max_history of a user (0: none); then numbers what is left.

        One pass, not a k-core: an item may fall below its minimum again because its users were dropped.
        Returns counts of events, users and items before and after.
        """
        self._types = {role: self._final_type(role) for role in self._roles if role != "timestamp"}
        keeps_all = max(min_user_events, min_item_events, min_vocabulary_count) == 1 and not max_history
        keeps_all &= times == (None, None)
        sizes = 'SELECT count(*), count(DISTINCT "user"), count(DISTINCT item) FROM raw'
        read = None if keeps_all else self._run(sizes)
        self.keep_times(*times)
        for role, least in (("item", min_item_events), ("user", min_user_events)):
            if least > 1:
                rare = f'SELECT "{role}" FROM raw GROUP BY "{role}" HAVING count(*) < {least}'
                self._run(f'DELETE FROM raw WHERE "{role}" IN ({rare})')
        if max_history:
            self._keep_newest(max_history)
        for role in self._indexed:
            # Indices by falling count; the raw form of the id stays beside it, as the key of the later join.
            value = f'CAST("{role}" AS {SQL_TYPES[self._types[role]]})'
            least = 1 if role == "user" else min_vocabulary_count
            self._run(
                f'CREATE TABLE "vocab_{role}" AS '
                f"SELECT raw_id, id, n, row_number() OVER (ORDER BY n DESC, id) + {FIRST - 1} AS idx FROM "
                f'(SELECT "{role}" AS raw_id, {value} AS id, count(*) AS n FROM raw '
                f'WHERE "{role}" IS NOT NULL GROUP BY raw_id HAVING count(*) >= {least})'
            )
        (kept,) = self._run(
            'SELECT (SELECT count(*) FROM raw), (SELECT count(*) FROM "vocab_user"), (SELECT count(*) FROM vocab_item)'
        )
        (read,) = read or (kept,)
        names = ("events", "users", "items")
        return dict(zip(names, kept, strict=True)) | {f"read_{n}": count for n, count in zip(names, read, strict=True)}

    def keep_times(self, first: int | None, end: int | None) -> int:
        """Drops events outside [first, end), in the store's unit; returns how many went."""
        outside = [f"timestamp < {first}"] if first is not None else []
        outside += [f"timestamp >= {end}"] if end is not None else []
        return self._one(f"DELETE FROM raw WHERE {' OR '.join(outside)}") if outside else 0

    def _keep_newest(self, count: int) -> None:
        order = ["timestamp", *([self._value("event_id")] if "event_id" in self._roles else []), "rowid"]
        newest_first = ", ".join(f"{key} DESC" for key in order)
        long = f'SELECT "user" FROM raw GROUP BY "user" HAVING count(*) > {count}'
        self._delete(
            f'SELECT id FROM (SELECT rowid AS id, row_number() OVER (PARTITION BY "user" ORDER BY {newest_first}) '
            f'AS age FROM raw WHERE "user" IN ({long})) WHERE age > {count}'
        )

    def num_staged(self) -> int:
        """Events that are staged now."""
        return self._one("SELECT count(*) FROM raw")

    def id_type(self, role: str) -> str | None:
        """ "int64" or "string", None where the log has no such column; known after select()."""
        return self._types.get(role)

    def vocabulary(self, role: str) -> Vocabulary:
        """As IngestEngine.vocabulary."""
        return self._vocabulary(role, f'SELECT id, n FROM "vocab_{role}" ORDER BY idx')

    def staged_batches(self) -> pa.RecordBatchReader:
        """The staged events as (seq, one column per role), in input order; seq is the place in the input."""
        columns = ", ".join(f'"{role}"' for role in self._roles)
        return self._batches(f"SELECT rowid AS {SEQ}, {columns} FROM raw")

    def write(
        self, staging: LocalStaging | RemoteStaging, *, num_buckets: int, schema: pa.Schema, row_group_events: int
    ) -> tuple[list[HistoryFile], dict[str, int]]:
        """Kept events sorted by bucket, user, timestamp, event_id, input order (seq), ids of item and context as
        vocabulary indices -> data files. Returns what write_sorted does."""
        num_events = self.num_staged()  # no question may come while the answer to the next one is being read
        return write_sorted(
            self._sorted(self._new_events(num_buckets)),
            root=staging.root,
            schema=schema,
            row_group_events=row_group_events,
            checks=self._checks,
            unit=self._unit,
            num_events=num_events,
        )

    def _new_events(self, num_buckets: int) -> str:
        """SQL of the staged events as (bucket, user_id, timestamp, [event_id,] item, context..., seq)."""
        leaves = ["raw.timestamp AS timestamp"]
        if "event_id" in self._roles:
            leaves.append(f"{self._value('event_id')} AS event_id")
        leaves.append(f"coalesce(i.idx, {UNKNOWN}) AS item")
        joins = 'LEFT JOIN "vocab_item" i ON i.raw_id = raw.item'
        for number, role in enumerate(self._indexed[2:]):
            leaves.append(f'coalesce(c{number}.idx, {UNKNOWN}) AS "{role}"')
            joins += f' LEFT JOIN "vocab_{role}" c{number} ON c{number}.raw_id = raw."{role}"'
        user = self._value("user")
        return (
            f"SELECT {self._bucket(user, num_buckets)} AS bucket, {user} AS user_id, {', '.join(leaves)}, "
            f"raw.rowid AS {SEQ} FROM raw {joins}"
        )

    def _sorted(self, events: str) -> pa.RecordBatchReader:
        order = "timestamp, event_id" if "event_id" in self._roles else "timestamp"
        sql = f"SELECT * FROM ({events}) ORDER BY bucket, user_id, {order}, {SEQ}"
        return self._batches(sql)

    def _bucket(self, user: str, num_buckets: int) -> str:
        return bucket_sql(user, self._types["user"], num_buckets)

    def _staged_sql(self, source: Source, role: str) -> str:
        if role == "timestamp":
            return time_sql(source.raw[role], source.kinds[role], self._unit)
        return source.ids[role]

    def _value(self, role: str) -> str:
        return f'CAST(raw."{role}" AS {SQL_TYPES[self._types[role]]})'

    def _final_type(self, role: str) -> str:
        """Text ids are integers where every one of them is written as DuckDB would write that integer ("07" is not)."""
        if self._kinds[role] == "int64":
            return "int64"
        if self._is_typed:
            return "string"  # the file says what it means
        return "string" if self._not_an_integer(role) is not None else "int64"

    def _not_an_integer(self, role: str) -> str | None:
        """The first (by text) id that is not written as an integer, None where all are."""
        return self._one(
            f'SELECT min(t) FROM (SELECT DISTINCT "{role}" AS t FROM raw WHERE "{role}" IS NOT NULL) '
            "WHERE TRY_CAST(t AS BIGINT) IS NULL OR TRY_CAST(t AS BIGINT)::VARCHAR <> t"
        )

    def _explain(self, source: Source, *, row: int, check: str, more: int) -> None:
        """Reads the one bad row again and raises DataError that quotes it. row counts from 0."""
        roles = ID_ROLES if check in ("null_ids", "null_words") else ("timestamp",)
        needed = [role for role in self._roles if role in roles]
        others = f" ({more} more such rows in this file; checks.{check}=drop drops them)"
        quoted = [time_text_sql(source.raw[r], source.kinds[r]) for r in needed]
        values = ", ".join([*quoted, *(f"({self._staged_sql(source, r)})" for r in needed)])
        scan = source.quoted.scan if source.quoted else source.scan
        (found,) = self._run(f"SELECT {values} FROM {scan} LIMIT 1 OFFSET {row}")
        raw, staged = found[: len(needed)], found[len(needed) :]
        where = f"{source.path}: row {row + 1}:"
        if check == "future_times":
            is_number = source.kinds["timestamp"] not in MOMENTS
            advice = unit_advice(staged[0], self._unit, "timestamp_unit") if is_number else "repair such rows"
            raise DataError(
                f"{where} timestamp {raw[0]!r:.200} is in the future for timestamp_unit={self._unit}; {advice}, or set "
                f"checks.future_times=keep{others}"
            )
        if check == "null_words":
            role = next(r for r, v in zip(needed, staged, strict=True) if v in NULL_WORDS)
            raise DataError(
                f"{where} {role} {raw[needed.index(role)]!r} is what writers put for a missing id; repair such rows, "
                f"or set checks.null_words=keep where it is an id{others}"
            )
        role, value = next((r, v) for r, v, s in zip(needed, raw, staged, strict=True) if s is None)
        where += f" {role}"
        if value is None or value == "":
            raise DataError(f"{where} is empty (null); drop or repair such rows{others}")
        if role != "timestamp":
            exactly = "" if isinstance(value, int) else " exactly"
            raise DataError(f"{where} {value!r} does not fit int64{exactly}; write it as a string{others}")
        raise DataError(f"{where} {value!r:.200} {time_fault(value, source.kinds[role], self._unit)}{others}")
