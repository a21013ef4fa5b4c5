"""Spark's part of an ingest: what DuckEngine does on one machine, spread over a cluster.

    input files --read_files, a task per file--> events (persisted)   DuckDB parses and checks them, as always
    events      --clean, select--> kept events, vocabularies          Spark SQL: windows, joins, counts
    kept events --a partition per bucket, sorted--> write_buckets     the writer, on the executors

Spark moves, counts and sorts; it never reads or writes a file of the user's, so paths and credentials are those of
location.py. The driver sees vocabularies and one line per file. Input order, the tie-break of the sort, is `seq`:
number of the file, then row in the file, given where a file is read from its beginning to its end.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import LongType, StringType, StructField, StructType

from elastic_rec.feature_store.ingestion.checks import SEQ, ChecksConfig, Policy, duplicates_found
from elastic_rec.feature_store.ingestion.engines.spark.session import open_session
from elastic_rec.feature_store.ingestion.engines.spark.tasks import (
    ABOUT,
    ERROR,
    FILE,
    FOUND,
    STAGED,
    ReadJob,
    WriteJob,
    read_files,
    write_buckets,
)
from elastic_rec.feature_store.ingestion.inputs import check_entries
from elastic_rec.feature_store.ingestion.sources import open_source
from elastic_rec.feature_store.ingestion.writer import BUCKET
from elastic_rec.feature_store.table.format import HistoryFile, SourceFile
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.schema import ARROW_TYPES, EVENT_ID, TIMESTAMP, USER
from elastic_rec.feature_store.table.staging import LocalStaging, RemoteStaging
from elastic_rec.feature_store.table.times import iso_time
from elastic_rec.feature_store.table.vocabulary import FIRST, UNKNOWN, Vocabulary
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.scratch import scratch_folder

TYPES = {"int64": LongType(), "string": StringType()}
COUNT, INDEX, HELPER = "how often", "index of ", "of the moment"  # no input column can be called so


class SparkEngine:
    """The calls of DuckEngine, in their order. roles: "user", "item", "timestamp", optionally "event_id", and one per
    context column."""

    def __init__(
        self, *, master: str | None, roles: list[str], unit: str, memory_limit: str, threads: int, checks: ChecksConfig
    ) -> None:
        self._spark, self._is_ours = open_session(master)
        self._roles, self._unit = roles, unit
        self._memory_limit, self._threads = memory_limit, threads
        # "One day from now" must be one moment, whenever and how often a task runs.
        self._checks = replace(checks, future_after=iso_time(checks.future_after_s()))
        self._indexed = [role for role in roles if role not in ("timestamp", "event_id")]
        self._staged: list[DataFrame] = []
        self._numbers: dict[str, DataFrame] = {}
        self._vocabularies: dict[str, Vocabulary] = {}

    def __enter__(self) -> SparkEngine:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._is_ours:
            self._spark.stop()
        else:
            for frame in (*self._staged, *self._numbers.values()):
                frame.unpersist()
        if isinstance(error, PySparkException) and "No module named" in str(error):
            missing = str(error).split("No module named", 1)[1].split("\n", 1)[0].strip()
            raise DataError(
                f"Spark's executors have no Python package {missing}; they need elastic-rec's feature_store, pyarrow, "
                "duckdb, numpy and tqdm: see docs/how-to/spark.md"
            ) from error

    def load_inputs(self, paths: list[Location], *, format: str, columns: dict[str, str]) -> list[SourceFile]:
        """As IngestEngine.load_inputs; each file in a task of its own."""
        first, kinds = self._first_kinds(paths, format, columns)
        self._raw_types = {
            role: "int64" if role == "timestamp" or kinds[role] == "int64" else "string" for role in self._roles
        }
        self._is_typed = format == "parquet"
        fields = [(SEQ, "int64"), *self._raw_types.items(), (ABOUT, "string")]
        job = ReadJob(
            files=[(path.url, os.path.abspath(path) if path.is_local else path.url) for path in paths],
            format=format,
            columns=columns,
            first=first,
            kinds=kinds,
            schema=pa.schema([(name, ARROW_TYPES[type]) for name, type in fields]),
            unit=self._unit,
            memory_limit=self._memory_limit,
            threads=max(1, self._threads),
            checks=self._checks,
        )
        schema = StructType([StructField(name, TYPES[type]) for name, type in fields])
        numbers = self._spark.range(0, len(paths), 1, len(paths))
        staged = numbers.mapInArrow(lambda batches: read_files(batches, job), schema).persist()
        self._staged = [staged]
        about = _answers(staged.where(F.col(ABOUT).isNotNull()))
        self._events = staged.where(F.col(ABOUT).isNull()).drop(ABOUT)
        self._count = sum(answer[STAGED] for answer in about)
        self._found = Counter()
        for answer in about:
            self._found.update(answer[FOUND])
        entries = [SourceFile(**answer[FILE]) for answer in about]
        check_entries(entries)
        self._first_rows = np.cumsum([0, *(entry.events for entry in entries)])[:-1]
        return entries

    def _first_kinds(self, paths: list[Location], format: str, columns: dict[str, str]) -> tuple[str, dict[str, str]]:
        """(name, kinds of columns) of the first file that has rows; all text is of one kind."""
        if format == "parquet":
            for path in paths:
                with scratch_folder() as work:
                    source = open_source(path, path.fetch(work), format=format, columns=columns, work=work)
                if not source.is_empty:
                    return str(path), source.kinds
        return str(paths[0]), dict.fromkeys(columns, "text")

    def clean(self) -> dict[str, int]:
        """As DuckEngine.clean; what single rows decide was done where they were read."""
        found = dict(self._found)
        found["duplicates"] = self._duplicates()
        if self._checks.out_of_order is Policy.drop:
            before = Window.partitionBy("user").orderBy(SEQ).rowsBetween(Window.unboundedPreceding, -1)
            newest = F.coalesce(F.max("timestamp").over(before), F.col("timestamp"))
            found["out_of_order"] = self._keep(self._where(F.col("timestamp") >= newest))
        if self._checks.gaps is Policy.drop:
            users = Window.partitionBy("user")
            next_time = F.lead("timestamp").over(users.orderBy("timestamp"))
            is_before_gap = next_time - F.col("timestamp") > self._checks.max_gap(self._unit)
            events = self._events.withColumn(HELPER, F.when(is_before_gap, F.col("timestamp")))
            events = events.withColumn(HELPER, F.max(HELPER).over(users))
            is_after = F.col(HELPER).isNull() | (F.col("timestamp") > F.col(HELPER))
            found["gaps"] = self._keep(events.where(is_after).drop(HELPER))
        return found

    def _duplicates(self) -> int:
        if "event_id" not in self._roles:
            return 0
        number = F.row_number().over(Window.partitionBy("user", "timestamp", "event_id").orderBy(SEQ))
        if self._checks.duplicates is Policy.drop:
            return self._keep(self._where(number == 1))
        later = self._where(number > 1)
        count = later.count()
        if count and self._checks.duplicates is Policy.fail:
            example = later.orderBy(SEQ).first()
            raise duplicates_found(count, example["user"], example["timestamp"], example["event_id"])
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
        """As DuckEngine.select: the same filters in the same order."""
        self._settle_types()
        users, items = self._events.select(F.count_distinct("user"), F.count_distinct("item")).first()
        counts = {"read_events": self._count, "read_users": users, "read_items": items}
        before = self._events
        first, end = times
        if first is not None:
            self._events = self._events.where(F.col("timestamp") >= first)
        if end is not None:
            self._events = self._events.where(F.col("timestamp") < end)
        for role, least in (("item", min_item_events), ("user", min_user_events)):
            if least > 1:
                counted = self._events.groupBy(role).agg(F.count("*").alias(COUNT))
                self._events = self._events.join(counted.where(F.col(COUNT) < least), role, "left_anti")
        if max_history:
            keys = ["timestamp", *(["event_id"] if "event_id" in self._roles else []), SEQ]
            newest_first = Window.partitionBy("user").orderBy(*(F.desc(key) for key in keys))
            self._events = self._where(F.row_number().over(newest_first) <= max_history)
        if self._events is not before:
            self._keep(self._events)
        for role in self._indexed:
            self._number(role, 1 if role == "user" else min_vocabulary_count)
        sizes = {f"{role}s": self._vocabularies[role].size - FIRST for role in ("user", "item")}
        return counts | {"events": self._count} | sizes

    def id_type(self, role: str) -> str | None:
        """ "int64" or "string", None where the log has no such column; known after select()."""
        return self._types.get(role)

    def vocabulary(self, role: str) -> Vocabulary:
        """As IngestEngine.vocabulary."""
        return self._vocabularies[role]

    def write(
        self, staging: LocalStaging | RemoteStaging, *, num_buckets: int, schema: pa.Schema, row_group_events: int
    ) -> tuple[list[HistoryFile], dict[str, int]]:
        """As DuckEngine.write, from the executors into staging.target."""
        target = staging.target
        job = WriteJob(
            target=target.url,
            scratch=str(staging.work) if target.is_local else None,
            schema=schema,
            row_group_events=row_group_events,
            checks=self._checks,
            unit=self._unit,
            first_rows=self._first_rows,
        )
        order = [BUCKET, USER, TIMESTAMP, *([EVENT_ID] if "event_id" in self._roles else []), SEQ]
        events = self._new_events(num_buckets).repartitionById(num_buckets, BUCKET).sortWithinPartitions(*order)
        about = _answers(events.mapInArrow(lambda batches: write_buckets(batches, job), f"`{ABOUT}` string"))
        entries = (HistoryFile(**entry) for answer in about for entry in answer[FILE])
        files = sorted(entries, key=lambda entry: entry.path)
        sizes = target.sizes([entry.path for entry in files])
        for entry, size in zip(files, sizes, strict=True):
            if size != entry.bytes:
                raise DataError(
                    f"{target / entry.path}: written by an executor and not seen by the driver; `out` must be on "
                    "storage that all machines share (s3://..., hdfs://..., a network disk)"
                )
        found = Counter({"out_of_order": 0, "gaps": 0})
        for answer in about:
            found.update(answer[FOUND])
        return files, dict(found)

    def _new_events(self, num_buckets: int) -> DataFrame:
        """The kept events as (bucket, user_id, timestamp, [event_id,] item, context..., seq)."""
        events = self._events
        for role in self._indexed[1:]:
            events = events.join(self._numbers[role].drop(COUNT), role, "left")
        ids = [F.coalesce(INDEX + role, F.lit(UNKNOWN)).cast("bigint").alias(role) for role in self._indexed[1:]]
        event_id = [F.col("event_id").alias(EVENT_ID)] if "event_id" in self._roles else []
        bucket = _bucket(F.col("user"), self._types["user"], num_buckets).alias(BUCKET)
        return events.select(
            bucket, F.col("user").alias(USER), F.col("timestamp").alias(TIMESTAMP), *event_id, *ids, SEQ
        )

    def _settle_types(self) -> None:
        """Text ids become integers where all of them are written as integers are; see DuckEngine._final_type."""
        self._types = {role: type for role, type in self._raw_types.items() if role != "timestamp"}
        texts = [role for role, type in self._types.items() if type == "string" and not self._is_typed]
        if not texts:
            return
        written = {role: F.col(role).try_cast("bigint").cast("string") for role in texts}
        # A null is a text that is no integer, or a null context, which says nothing.
        no_integer = [F.max(F.col(role).isNotNull() & ~F.equal_null(F.col(role), written[role])) for role in texts]
        (found,) = self._events.select(*no_integer).collect()
        for role, is_text in zip(texts, found, strict=True):
            if not is_text:
                self._types[role] = "int64"
                self._events = self._events.withColumn(role, F.col(role).cast("bigint"))

    def _number(self, role: str, least: int) -> None:
        """Numbers a column's values by falling count, then by id. One task does it, for the ids of all events."""
        counted = self._events.where(F.col(role).isNotNull()).groupBy(role).agg(F.count("*").alias(COUNT))
        ranked = counted.where(F.col(COUNT) >= least).repartition(1).sortWithinPartitions(F.desc(COUNT), F.asc(role))
        numbers = ranked.withColumn(INDEX + role, F.monotonically_increasing_id() + FIRST).persist()
        self._numbers[role] = numbers
        table = numbers.select(role, COUNT).toArrow()  # one partition, sorted: the rows come in that order
        ids = table[role].cast(ARROW_TYPES[self._types[role]]).combine_chunks()
        self._vocabularies[role] = Vocabulary(column=role, ids=ids, counts=table[COUNT].to_numpy())

    def _where(self, condition: Column) -> DataFrame:
        """Events for which a condition over windows holds."""
        return self._events.withColumn(HELPER, condition).where(F.col(HELPER)).drop(HELPER)

    def _keep(self, events: DataFrame) -> int:
        """Makes these the staged events; returns how many went."""
        events = events.persist()
        before, self._count = self._count, events.count()
        for frame in self._staged:
            frame.unpersist()
        self._events, self._staged = events, [events]
        return before - self._count


def _answers(rows: DataFrame) -> list[dict]:
    """What the tasks say; DataError where one of them failed, the first in the order of input or output."""
    answers = [json.loads(row[ABOUT]) for row in rows.collect()]
    for answer in answers:
        if ERROR in answer:
            raise DataError(answer[ERROR])
    return answers


def _bucket(user: Column, type: str, num_buckets: int) -> Column:
    """ingest.BUCKET_HASH."""
    if type == "int64":
        return F.pmod(user, F.lit(num_buckets)).cast("int")
    number = F.conv(F.substring(F.md5(user.cast("binary")), 1, 15), 16, 10).cast("bigint")
    return F.pmod(number, F.lit(num_buckets)).cast("int")
