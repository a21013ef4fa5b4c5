"""The parts of a store that ingest and append write alike, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from elastic_rec.feature_store.ingestion.checks import ChecksConfig, OrderWatch
from elastic_rec.feature_store.ingestion.writer import WrittenFile, write_histories
from elastic_rec.feature_store.table import manifest
from elastic_rec.feature_store.table.schema import EVENTS, USER

if TYPE_CHECKING:
    from elastic_rec.feature_store.ingestion.engines.duckdb import DuckEngine
    from elastic_rec.feature_store.ingestion.engines.spark.engine import SparkEngine


def write_sorted(
    batches: Iterable[pa.RecordBatch],
    *,
    root: Path,
    schema: pa.Schema,
    row_group_events: int,
    checks: ChecksConfig,
    unit: str,
    num_events: int = 0,
) -> tuple[list[dict], dict[str, int]]:
    """Sorted events -> data files under root. Returns what the manifest says of each, and counts of the checks that
    look at whole histories. num_events is for the progress bar."""
    watch = OrderWatch(checks, unit)
    written = write_histories(
        batches, root=root, schema=schema, row_group_events=row_group_events, watch=watch, num_events=num_events
    )
    return [_describe_written(root, file) for file in written], watch.counts


def write_vocabularies(engine: DuckEngine | SparkEngine, columns: list[str], root: Path) -> dict[str, dict]:
    (root / "vocab").mkdir()
    entries = {}
    for column in columns:
        path = root / "vocab" / f"{column}.parquet"
        vocabulary = engine.vocabulary(column)
        vocabulary.write(path)
        described = manifest.describe_file(root, path)
        entries[column] = {"size": vocabulary.size, "type": engine.id_type(column), **described}
    return entries


def describe_schema(store_schema: pa.Schema) -> dict:
    leaves = store_schema.field(EVENTS).type.value_type
    return {
        USER: str(store_schema.field(USER).type),
        EVENTS: {leaf.name: str(leaf.type) for leaf in leaves},
    }


def _describe_written(root: Path, file: WrittenFile) -> dict:
    return {
        **manifest.describe_data_file(root, file.path),
        "num_users": sum(users for users, _ in file.row_groups),
        "num_events": sum(events for _, events in file.row_groups),
        "row_groups": [list(group) for group in file.row_groups],
        "min_time": file.min_time,
        "max_time": file.max_time,
    }
