"""Run by test_time_zones.py in a process of its own, since DuckDB and Spark take the machine's zone when they start.

Ingests the same instants in every form, appends, adds impressions; prints what came of it as JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from feature_store_reference import QUICK

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions
from elastic_rec.feature_store.table.store import Store
from elastic_rec.pipeline.tasks.ranking.candidate_times import read_times

FORMS = ("zoned", "naive", "nanoseconds", "int96", "seconds", "zoned.csv", "naive.csv")


def main(inputs: Path, out: Path, *, spark: bool) -> dict:
    digests = {}
    for form in FORMS:
        name = form if form.endswith(".csv") else f"{form}.parquet"
        common = {"out": str(out / form), "threads": 1, "num_buckets": 1, "event_id_column": "event_id"}
        ingest(IngestConfig(input=[str(inputs / name)], **common))
        digests[form] = digest(out / form, "bucket=*/*.parquet", "vocab/*.parquet")
    if spark:
        with quick_session():
            common["out"] = str(out / "spark")
            ingest(IngestConfig(input=[str(inputs / "zoned.parquet")], engine="spark", **common))
        digests["spark"] = digest(out / "spark", "bucket=*/*.parquet", "vocab/*.parquet")

    # The first day again, as another machine wrote it, with a late event and a new one.
    again = AppendConfig(input=[str(inputs / "again.parquet")], store=str(out / "zoned"), threads=1)
    appended = append(again)
    lists = ImpressionConfig(input=[str(inputs / "shown.parquet")], label_columns=["click"])
    ingest_impressions(lists, out=str(out / "zoned"))
    store = Store.open(out / "zoned")
    about = {"unit": "s", "store": store, "where": "candidates", "first_row": 1}
    return {
        "zone": time.tzname[0],
        "digests": digests,
        "appended": [appended[key] for key in ("dropped_duplicates", "appended_events")],
        "late": appended["checks"]["out_of_order"],
        "histories": histories(store),
        "impressions": [
            row["timestamp"] for path in (out / "zoned/impressions").glob("bucket=*/*") for row in rows(path)
        ],
        "candidates": read_times(pq.read_table(inputs / "shown.parquet")["timestamp"], **about).tolist(),
        "impression digest": digest(out / "zoned/impressions", "**/*.parquet"),
        "version": store.manifest.hash,
    }


@contextmanager
def quick_session() -> Iterator[None]:
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master("local[1]")
    for key, value in QUICK.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    yield
    session.stop()


def histories(store: Store) -> list[list]:
    """[time, item] of the store's only user."""
    (user,) = [row for file in store.files for row in rows(file.path)]
    items = store.vocabulary("item").decode(pa.array([e["item"] for e in user["events"]]).to_numpy()).to_pylist()
    return [[e["timestamp"], item] for e, item in zip(user["events"], items, strict=True)]


def rows(path: Path) -> list[dict]:
    return pq.read_table(str(path)).to_pylist()


def digest(folder: Path, *patterns: str) -> str:
    """Of the bytes of all files."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), spark="spark" in sys.argv[3:])))
