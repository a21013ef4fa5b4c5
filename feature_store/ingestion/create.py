"""Raw event log -> history store, all or nothing.

    input files --engine: check, filter, sort--> Arrow batches --writer--> <out>.tmp-<pid>/ --one rename--> <out>

The manifest is the last file written into the staging folder and the rename the last act: at no moment is there a
half store under `out`. An error removes the staging folder; a killed process leaves it, and the next ingest to the
same `out` clears it away (its lock is gone with the process).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from elastic_rec.feature_store.ingestion.checks import CHECKS, ChecksConfig, Policy
from elastic_rec.feature_store.ingestion.engines.base import IngestEngine
from elastic_rec.feature_store.ingestion.engines.duckdb import DuckEngine
from elastic_rec.feature_store.ingestion.inputs import find_inputs
from elastic_rec.feature_store.ingestion.writer import describe_schema, write_vocabularies
from elastic_rec.feature_store.table import schema
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.staging import LocalStaging, RemoteStaging, stage
from elastic_rec.feature_store.table.times import parse_time_s
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.progress import peak_memory_bytes

FILTERS = ("min_user_events", "min_item_events", "max_history", "min_vocabulary_count")
BUCKET_HASH = "int64: ((id % N) + N) % N; string: int(md5(utf8).hexdigest()[:15], 16) % N"


class InputFormat(Enum):
    auto = "auto"
    csv = "csv"
    tsv = "tsv"
    parquet = "parquet"


class TimeUnit(Enum):
    s = "s"
    ms = "ms"
    us = "us"
    ns = "ns"


class Engine(Enum):
    duckdb = "duckdb"
    spark = "spark"


class IngestMode(Enum):
    create = "create"
    append = "append"
    vacuum = "vacuum"
    restore = "restore"
    impressions = "impressions"


@dataclass
class IngestConfig:
    """What to read, what to keep, where to write. Enums also take their value as a string."""

    mode: IngestMode = field(
        default=IngestMode.create,
        metadata={
            "help": "create: a new store at `out`. The others change the store there: append folds new input in, "
            "vacuum deletes versions that nobody needs, restore makes an earlier version the current one, "
            "impressions writes data.impressions into the store (create does so, too)."
        },
    )
    name: str = field(default="events", metadata={"help": "Name of the data set; goes into the manifest."})
    input: list[str] = field(
        default_factory=list,
        metadata={"help": "Files, globs or folders, in order; the order breaks ties between equal timestamps."},
    )
    format: InputFormat = field(
        default=InputFormat.auto, metadata={"help": "Input format; auto: by each file's name, or content."}
    )
    user_column: str = field(default="user_id", metadata={"help": "Input column with the user (int64 or string)."})
    item_column: str = field(default="item_id", metadata={"help": "Input column with the item (int64 or string)."})
    timestamp_column: str = field(
        default="timestamp",
        metadata={"help": "Input column with the event's time: a number since 1970, a timestamp, or an ISO text."},
    )
    event_id_column: str | None = field(
        default=None,
        metadata={
            "help": "Input column that orders events of equal time (none: input order does); of events equal in user, "
            "time and event id one is kept."
        },
    )
    context_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "Categorical event columns to keep (action, rating); null becomes unknown."},
    )
    timestamp_unit: TimeUnit = field(
        default=TimeUnit.s,
        metadata={"help": "Unit of numbers in timestamp_column, and of the store: s, ms, us or ns."},
    )
    min_user_events: int = field(
        default=1, metadata={"help": "Drop users with fewer events, counted after rare items are dropped."}
    )
    min_item_events: int = field(
        default=1, metadata={"help": "Drop items with fewer events, counted before users are dropped (no k-core)."}
    )
    max_history: int = field(
        default=0, metadata={"help": "Keep the newest so many events of a user, after the other filters; 0: all."}
    )
    first_time: str | None = field(
        default=None, metadata={"help": "Drop events before it: ISO date (UTC unless it says) or epoch seconds."}
    )
    end_time: str | None = field(default=None, metadata={"help": "Drop events at or after it, as first_time."})
    min_vocabulary_count: int = field(
        default=1,
        metadata={
            "help": "Items and context values with fewer kept events share the id of unknown (1); their events stay. "
            "append: counted over the appended events, for ids that are new."
        },
    )
    checks: ChecksConfig = field(
        default_factory=ChecksConfig, metadata={"help": "What is checked, and what becomes of events that fail."}
    )
    num_buckets: int = field(default=16, metadata={"help": "Files to spread users over, by a hash of the user id."})
    row_group_events: int = field(
        default=131072, metadata={"help": "Events in a Parquet row group (a longer user gets one of his own)."}
    )
    out: str = field(default="", metadata={"help": "Folder of the store to write."})
    overwrite: bool = field(
        default=False, metadata={"help": "Replace the store at `out`, once the new one is complete."}
    )
    engine: Engine = field(
        default=Engine.duckdb,
        metadata={
            "help": "What checks, filters and sorts: duckdb on this machine, or spark on a cluster (create only; "
            "extra `spark`). Both give the same store."
        },
    )
    spark_master: str | None = field(
        default=None, metadata={"help": "spark: its master, as local[4]; none: what spark-submit or Spark's conf says."}
    )
    memory_limit: str = field(
        default="1GB",
        metadata={"help": "Memory of DuckDB; beyond it the sort spills beside `out` (spark: of each reading task)."},
    )
    threads: int = field(default=0, metadata={"help": "Threads of DuckDB; 0: one per core (spark: one per task)."})
    force: bool = field(
        default=False,
        metadata={"help": "append: take an input without event ids even if the store holds it already (doubles it)."},
    )
    version: int | None = field(default=None, metadata={"help": "restore: the version to go back to."})
    retention_hours: float = field(
        default=24.0,
        metadata={"help": "vacuum: keep versions that were current so many hours ago, for their open readers."},
    )

    def __post_init__(self) -> None:
        self.format, self.timestamp_unit = InputFormat(self.format), TimeUnit(self.timestamp_unit)
        self.mode, self.engine = IngestMode(self.mode), Engine(self.engine)
        self._check_mode()
        times = self.time_range()
        if None not in times and times[0] >= times[1]:
            raise ValueError(f"first_time={self.first_time} is not before end_time={self.end_time}")
        if self.max_history < 0:
            raise ValueError(f"max_history={self.max_history}: give 0 for all events, or more")
        for name in ("min_user_events", "min_item_events", "min_vocabulary_count", "num_buckets", "row_group_events"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.threads <= 4096:
            raise ValueError(f"threads={self.threads}: give 0 for one per core, or up to 4096")
        if self.num_buckets > 10000:
            raise ValueError(f"num_buckets={self.num_buckets}: at most 10000")
        for name in self.context_columns:
            if name.lower() in schema.RESERVED_NAMES or not name.replace("_", "a").isalnum():
                raise ValueError(
                    f"context_columns: '{name}' is reserved or not made of letters, digits and _; rename the column"
                )
        if len({name.lower() for name in self.context_columns}) < len(self.context_columns):
            raise ValueError(f"context_columns={self.context_columns}: a name is given twice")

    def _check_mode(self) -> None:
        mode = self.mode.value
        if self.overwrite and mode != "create":
            raise ValueError(f"overwrite=true replaces a store, mode={mode} changes one: set only one of them")
        if self.force and mode != "append":
            raise ValueError(f"force=true has no effect on mode={mode}; leave it out")
        if (self.version is not None) != (mode == "restore"):
            raise ValueError(f"mode={mode}, version={self.version}: restore needs a version, no other has one")
        if self.input and mode in ("vacuum", "restore"):
            raise ValueError(f"mode={mode} reads no input; leave input out")
        if self.engine is Engine.spark and mode != "create":
            raise ValueError(f"engine=spark makes stores (mode=create); mode={mode} needs engine=duckdb, for any store")
        if self.spark_master is not None and self.engine is not Engine.spark:
            raise ValueError(f"spark_master={self.spark_master} has no effect on engine=duckdb; set engine=spark")
        if self.retention_hours < 0:
            raise ValueError(f"retention_hours={self.retention_hours}: give 0 for none, or more")

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


def ingest(config: IngestConfig) -> dict:
    """Writes the store at config.out (mode=create). Returns its figures; DataError for bad input leaves nothing."""
    began = time.perf_counter()
    if not config.out:
        raise DataError("out is empty: say where to write the store")
    paths, format = find_inputs(config.input, format=config.format.value)
    with stage(config.out, overwrite=config.overwrite) as staging:
        content, figures = _build(config, paths, format, staging)
        staging.commit(content)
    seconds = time.perf_counter() - began
    return {
        "store": str(config.out),
        **figures,
        "seconds": round(seconds, 3),
        "events_per_s": round(figures["read_events"] / seconds),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _engine(config: IngestConfig, work: Path) -> IngestEngine:
    settings = {
        "roles": list(config.roles()),
        "unit": config.timestamp_unit.value,
        "memory_limit": config.memory_limit,
        "threads": config.threads,
        "checks": config.checks,
    }
    if config.engine is Engine.duckdb:
        return DuckEngine(work=work, **settings)
    try:
        from elastic_rec.feature_store.ingestion.engines.spark.engine import SparkEngine
    except ImportError as error:
        raise DataError(f"engine=spark needs PySpark ({error}): pip install 'elastic-rec[spark]'") from error
    return SparkEngine(master=config.spark_master, **settings)


def _build(
    config: IngestConfig, paths: list[Location], format: str, staging: LocalStaging | RemoteStaging
) -> tuple[dict, dict]:
    """Data files and vocabularies in staging.root; returns what the manifest says of them, and figures."""
    roles = config.roles()
    with _engine(config, staging.work) as engine:
        inputs = engine.load_inputs(paths, format=format, columns=roles)
        checks = engine.clean()
        filters = {name: getattr(config, name) for name in FILTERS}
        counts = engine.select(**filters, times=config.time_range())
        if counts["users"] == 0:
            raise DataError(
                f"no users left of {counts['read_users']} with {counts['read_events']} events after "
                f"min_item_events={config.min_item_events} and min_user_events={config.min_user_events}; lower them "
                "(or first_time, end_time leave nothing)"
            )
        vocabularies = write_vocabularies(engine, ["user", "item", *config.context_columns], staging.root)
        store_schema = schema.history_schema(
            user_type=engine.id_type("user"),
            event_id_type=engine.id_type("event_id"),
            context_columns=config.context_columns,
        )
        files, order_checks = engine.write(
            staging, num_buckets=config.num_buckets, schema=store_schema, row_group_events=config.row_group_events
        )
    dropped = {f"dropped_{what}": counts[f"read_{what}"] - counts[what] for what in ("events", "users", "items")}
    dropped["dropped_duplicates"] = checks["duplicates"] if config.checks.duplicates is Policy.drop else 0
    checks = order_checks | checks
    filters |= {"first_time": config.first_time, "end_time": config.end_time}
    content = {
        "generation": 0,
        "name": config.name,
        "time_unit": config.timestamp_unit.value,
        "num_users": counts["users"],
        "num_events": counts["events"],
        "num_buckets": config.num_buckets,
        "row_group_events": config.row_group_events,
        "bucket_hash": BUCKET_HASH,
        "schema": describe_schema(store_schema),
        "files": files,
        "vocabularies": vocabularies,
        "source": {"columns": roles, "files": [{**entry, "generation": 0} for entry in inputs]},
        "filters": filters | dropped,
        "checks": {name: checks[name] for name in CHECKS},
    }
    size = sum(entry["bytes"] for entry in [*content["files"], *vocabularies.values()])
    kept = {key: counts[key] for key in ("users", "items", "events")}
    kept["read_events"] = sum(entry["events"] for entry in inputs)
    figures = {**kept, **dropped, "checks": content["checks"]}
    return content, {**figures, "input_files": len(paths), "data_files": len(files), "written_bytes": size}
