"""Raw event log -> history store, all or nothing.

    input files --engine: check, filter, sort--> Arrow batches --writer--> <out>.tmp-<pid>/ --one rename--> <out>

The manifest is the last file written into the staging folder and the rename the last act: at no moment is there a
half store under `out`. An error removes the staging folder; a killed process leaves it, and the next ingest to the
same `out` clears it away (its lock is gone with the process).
"""

from __future__ import annotations

import time
from pathlib import Path

from elastic_rec.feature_store.ingestion.checks import CHECKS, Policy
from elastic_rec.feature_store.ingestion.config import Engine, IngestConfig
from elastic_rec.feature_store.ingestion.engines.base import IngestEngine
from elastic_rec.feature_store.ingestion.engines.duckdb import DuckEngine
from elastic_rec.feature_store.ingestion.inputs import find_inputs
from elastic_rec.feature_store.ingestion.writer import write_vocabularies
from elastic_rec.feature_store.table.format import HistoryManifest, HistorySchema, Source
from elastic_rec.feature_store.table.location import Location
from elastic_rec.feature_store.table.schema import history_schema
from elastic_rec.feature_store.table.staging import LocalStaging, RemoteStaging, stage
from elastic_rec.feature_store.utils.atomic_write import at_place
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.progress import peak_memory_bytes

FILTERS = ("min_user_events", "min_item_events", "max_history", "min_vocabulary_count")
BUCKET_HASH = "int64: ((id % N) + N) % N; string: int(md5(utf8).hexdigest()[:15], 16) % N"


def ingest(config: IngestConfig) -> dict:
    """Writes the store at config.out. Returns its figures; DataError for bad input leaves nothing."""
    began = time.perf_counter()
    if not config.out:
        raise DataError("out is empty: say where to write the store")
    paths, format = find_inputs(config.input, format=config.format.value)
    with at_place(config.out), stage(config.out, overwrite=config.overwrite) as staging:
        manifest, figures = _build(config, paths, format, staging)
        staging.commit(manifest)
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
) -> tuple[HistoryManifest, dict]:
    """Data files and vocabularies in staging.root; returns the manifest that names them, and figures."""
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
        columns = ["user", "item", *config.context_columns]
        vocabularies = write_vocabularies(map(engine.vocabulary, columns), staging.root)
        events = config.event_types(engine.id_type("event_id"))
        stored = HistorySchema(user_id=engine.id_type("user"), events=events)
        files, order_checks = engine.write(
            staging,
            num_buckets=config.num_buckets,
            schema=history_schema(stored.user_id, stored.events),
            row_group_events=config.row_group_events,
        )
    dropped = {f"dropped_{what}": counts[f"read_{what}"] - counts[what] for what in ("events", "users", "items")}
    dropped["dropped_duplicates"] = checks["duplicates"] if config.checks.duplicates is Policy.drop else 0
    checks = order_checks | checks
    filters |= {"first_time": config.first_time, "end_time": config.end_time}
    manifest = HistoryManifest(
        name=config.name,
        time_unit=config.timestamp_unit.value,
        num_users=counts["users"],
        num_events=counts["events"],
        num_buckets=config.num_buckets,
        row_group_events=config.row_group_events,
        bucket_hash=BUCKET_HASH,
        schema=stored,
        files=files,
        vocabularies=vocabularies,
        source=Source(columns=roles, files=inputs),
        filters=filters | dropped,
        checks={name: checks[name] for name in CHECKS},
    )
    kept = {key: counts[key] for key in ("users", "items", "events")}
    kept["read_events"] = sum(entry.events for entry in inputs)
    size = sum(entry.bytes for entry in manifest.named_files())
    figures = {**kept, **dropped, "checks": manifest.checks}
    return manifest, {**figures, "input_files": len(paths), "data_files": len(files), "written_bytes": size}
