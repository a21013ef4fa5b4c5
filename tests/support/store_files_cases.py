"""A small store with everything in it, for test_store_files_*.py."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from feature_store_reference import make_store, random_events, write_events
from impressions import config_of, random_impressions
from states import fold_store

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions
from elastic_rec.feature_store.table.store import Store


def add_impressions(store: Store, folder: Path, *, seed: int = 1) -> None:
    users, items = (store.vocabulary(name).ids.to_pylist() for name in ("user", "item"))
    rows = random_impressions(users, items, num=60, seed=seed)
    pq.write_table(pa.Table.from_pylist(rows), folder / "impressions-0.parquet")
    attributes = [{"item": item, "genres": ["a", "b"][: n % 3], "year": 1990 + n % 3} for n, item in enumerate(items)]
    pq.write_table(pa.Table.from_pylist(attributes), folder / "items.parquet")
    ingest_impressions(config_of(folder), out=str(store.path), threads=1)


def add_day(store: Store, folder: Path, *, seed: int = 9) -> Store:
    day = write_events(folder / f"day-{seed}.parquet", random_events(60, seed=seed))
    append(AppendConfig(input=[day], store=str(store.path), threads=1))
    return Store.open(store.path)


def full_store(folder: Path, **settings) -> Store:
    """Two versions, impressions, and states."""
    store = make_store(folder, random_events(300), context_columns=["action"], num_buckets=2, **settings)
    add_impressions(store, folder)
    store = add_day(store, folder)
    fold_store(store)
    return store
