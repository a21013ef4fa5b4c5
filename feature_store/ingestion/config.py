"""The configuration of an ingest of events, and of an append to a store."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from elastic_rec.configs.options import Options, option
from elastic_rec.feature_store.ingestion.checks import ChecksConfig
from elastic_rec.feature_store.table import schema
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.times import parse_time_s


class InputFormat(Enum):
    """Formats of input files; auto goes by their names, then by their content."""

    auto = "auto"
    csv = "csv"
    tsv = "tsv"
    parquet = "parquet"


class TimeUnit(Enum):
    """Units of numbers that are times: counts since 1970."""

    s = "s"
    ms = "ms"
    us = "us"
    ns = "ns"


class Engine(Enum):
    """What checks, filters and sorts an ingest."""

    duckdb = "duckdb"
    spark = "spark"


@dataclass
class ReadConfig(Options):
    """What an ingest and an append read, and how."""

    input: list[str] = option([], "Files, globs or folders, in order; the order breaks ties between equal timestamps.")
    format: InputFormat = option(InputFormat.auto, "Input format; auto: by each file's name, or content.")
    checks: ChecksConfig = option(ChecksConfig, "What is checked, and what becomes of events that fail.")
    memory_limit: str = option(
        "1GB", "Memory of DuckDB; beyond it the sort spills beside the store (spark: of each reading task)."
    )
    threads: int = option(0, "Threads of DuckDB; 0: one per core (spark: one per task).", at_least=0, at_most=4096)


@dataclass
class AppendConfig(ReadConfig):
    """Events to fold into a store. Columns, time unit, buckets and filters are those that the store was made with."""

    store: str = option("", "The store to append to.")
    force: bool = option(False, "Take an input without event ids even if the store holds it already (doubles it).")


@dataclass
class IngestConfig(ReadConfig):
    """What to read, what to keep, where to write. Enums also take their value as a string.

    Raises ValueError for values out of bounds, and for settings that do not go together.
    """

    name: str = option("events", "Name of the data set; goes into the manifest.")
    user_column: str = option("user_id", "Input column with the user (int64 or string).")
    item_column: str = option("item_id", "Input column with the item (int64 or string).")
    timestamp_column: str = option(
        "timestamp", "Input column with the event's time: a number since 1970, a timestamp, or an ISO text."
    )
    event_id_column: str | None = option(
        None,
        "Input column that orders events of equal time (none: input order does); of events equal in user, time and "
        "event id one is kept.",
    )
    context_columns: list[str] = option([], "Categorical event columns to keep (action, rating); null becomes unknown.")
    timestamp_unit: TimeUnit = option(
        TimeUnit.s, "Unit of numbers in timestamp_column, and of the store: s, ms, us or ns."
    )
    min_user_events: int = option(1, "Drop users with fewer events, counted after rare items are dropped.", at_least=1)
    min_item_events: int = option(
        1, "Drop items with fewer events, counted before users are dropped (no k-core).", at_least=1
    )
    max_history: int = option(
        0, "Keep the newest so many events of a user, after the other filters; 0: all.", at_least=0
    )
    first_time: str | None = option(None, "Drop events before it: ISO date (UTC unless it says) or epoch seconds.")
    end_time: str | None = option(None, "Drop events at or after it, as first_time.")
    min_vocabulary_count: int = option(
        1,
        "Items and context values with fewer kept events share the id of unknown (1); their events stay. In an append: "
        "counted over the appended events, for ids that are new.",
        at_least=1,
    )
    num_buckets: int = option(16, "Files to spread users over, by a hash of the user id.", at_least=1, at_most=10000)
    row_group_events: int = option(
        131072, "Events in a Parquet row group (a longer user gets a group alone).", at_least=1
    )
    out: str = option("", "Folder of the store to write.")
    overwrite: bool = option(False, "Replace the store at `out`, once the new one is complete.")
    engine: Engine = option(
        Engine.duckdb,
        "What checks, filters and sorts: duckdb on this machine, or spark on a cluster (extra `spark`). Both give the "
        "same store.",
    )
    spark_master: str | None = option(
        None, "spark: its master, as local[4]; none: what spark-submit or Spark's conf says."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.spark_master is not None and self.engine is not Engine.spark:
            raise ValueError(f"spark_master={self.spark_master} has no effect on engine=duckdb; set engine=spark")
        times = self.time_range()
        if None not in times and times[0] >= times[1]:
            raise ValueError(f"first_time={self.first_time} is not before end_time={self.end_time}")
        schema.check_names(self.context_columns, reserved=schema.RESERVED_NAMES, key="context_columns")

    def time_range(self) -> tuple[int | None, int | None]:
        """[first, end) in timestamp_unit; None: open."""
        scale = UNITS_PER_SECOND[self.timestamp_unit.value]
        first, end = (
            None if (text := getattr(self, key)) is None else parse_time_s(text, key=key) * scale
            for key in ("first_time", "end_time")
        )
        return first, end

    def roles(self) -> dict[str, str]:
        """role -> input column, event columns with a vocabulary in the order of the store's struct."""
        roles = {"user": self.user_column, "item": self.item_column, "timestamp": self.timestamp_column}
        if self.event_id_column:
            roles["event_id"] = self.event_id_column
        return roles | {name: name for name in self.context_columns}
