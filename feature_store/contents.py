"""The parts of a store that ingest and append write alike, and what the manifest says of them."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from elastic_rec.feature_store import manifest, schema
from elastic_rec.feature_store.cutter import WrittenFile
from elastic_rec.feature_store.engine import DuckEngine
from elastic_rec.feature_store.filesystem import Location, open_location
from elastic_rec.feature_store.progress import progress
from elastic_rec.feature_store.sources import open_source


def load_inputs(
    engine: DuckEngine, paths: list[Location], *, format: str, roles: dict[str, str], work: Path
) -> list[dict]:
    """Stages all files in order; one entry {path, format, bytes, sha256, events} each. roles: role -> input column.
    Files that are not on the local disk are copied to `work` while they are read."""
    named = ("user", "item", "timestamp", "event_id")
    settings = {role: f"{role}_column" if role in named else "context_columns" for role in roles}
    entries = []
    bar = progress("read", total=len(paths), unit=" files")
    for path in paths:
        local = path.fetch(work / "input")
        source = open_source(path, local, format=format, columns=roles, settings=settings)
        entry = {"path": str(path), "format": format, "bytes": local.stat().st_size}
        # What an append knows an input by: its bytes, not its name.
        entry["sha256"] = open_location(local).digest()
        entries.append(entry | {"events": engine.load(source)})
        if not path.is_local:
            local.unlink()
        bar.update(1)
    bar.close()
    return entries


def write_vocabularies(engine: DuckEngine, columns: list[str], root: Path) -> dict[str, dict]:
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
    leaves = store_schema.field(schema.EVENTS).type.value_type
    return {
        schema.USER: str(store_schema.field(schema.USER).type),
        schema.EVENTS: {leaf.name: str(leaf.type) for leaf in leaves},
    }


def describe_written(root: Path, file: WrittenFile) -> dict:
    return {
        **manifest.describe_file(root, file.path),
        "num_users": sum(users for users, _ in file.row_groups),
        "num_events": sum(events for _, events in file.row_groups),
        "row_groups": [list(group) for group in file.row_groups],
        "min_time": file.min_time,
        "max_time": file.max_time,
    }
