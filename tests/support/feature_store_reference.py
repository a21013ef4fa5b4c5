"""What an ingest should give, in plain Python, and random event logs to try it on (used by test_feature_store_*.py)."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.table.store import Store

Event = dict  # user, item, timestamp, optionally event_id, and context columns, raw values


def random_events(
    num_events: int, *, seed: int = 0, num_users: int = 40, num_items: int = 25, times: int = 50, strings: bool = False
) -> list[Event]:
    """Skewed users, few distinct times (so most events are tied), contexts action and rating."""
    rng = np.random.default_rng(seed)
    users = (rng.pareto(1.0, num_events) * 5).astype(int) % num_users - num_users // 2
    items = rng.integers(0, num_items, num_events)
    clock = rng.integers(1_000_000, 1_000_000 + times, num_events)
    return [
        {
            "user": f"ü{u}" if strings else int(u),
            "item": f'item {i}, "the" {i}' if strings else int(i) - 3,
            "timestamp": int(t),
            "event_id": int(e),
            "action": ("view", "buy", "click")[a],
            "rating": int(r),
        }
        for u, i, t, e, a, r in zip(
            users,
            items,
            clock,
            rng.permutation(num_events),
            rng.integers(0, 3, num_events),
            rng.integers(1, 6, num_events),
            strict=True,
        )
    ]


def table_of(events: list[Event]) -> pa.Table:
    table = pa.Table.from_pylist(events)
    return table.rename_columns([{"user": "user_id", "item": "item_id"}.get(n, n) for n in table.column_names])


def write_events(path: Path, events: list[Event]) -> str:
    table = table_of(events)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=max(1, len(events) // 3))
    elif path.suffix == ".tsv":  # no quotes, whatever the fields hold
        rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
        path.write_text("".join("\t".join(map(str, row)) + "\n" for row in [table.column_names, *rows]))
    else:
        pa_csv.write_csv(table, path)
    return str(path)


def make_store(folder: Path, events: list[Event], **settings) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    source = write_events(folder / "events.parquet", events)
    defaults = {"num_buckets": 3, "row_group_events": 60, "threads": 1, "out": str(folder / "store")}
    config = IngestConfig(input=[source], **{**defaults, **settings})
    ingest(config)
    return Store.open(config.out)


def reference_histories(
    events: list[Event], *, event_id: bool = False, min_item_events: int = 1, min_user_events: int = 1
) -> dict:
    """user -> his events in order; sorted() is stable, so ties keep the order of `events`."""
    items = Counter(e["item"] for e in events)
    events = [e for e in events if items[e["item"]] >= min_item_events]
    users = Counter(e["user"] for e in events)
    histories: dict = {}
    for e in sorted(events, key=lambda e: (e["timestamp"], e["event_id"] if event_id else 0)):
        if users[e["user"]] >= min_user_events:
            histories.setdefault(e["user"], []).append(e)
    return histories


def bucket_of(user: int | str, num_buckets: int) -> int:
    if isinstance(user, int):
        return user % num_buckets  # Python's % is never negative
    return int(hashlib.md5(user.encode()).hexdigest()[:15], 16) % num_buckets


def stored_histories(store: Store, columns: list[str]) -> dict:
    """user -> list of events with raw values, read by plain pyarrow; checks bucket and order of users on the way."""
    histories: dict = {}
    for file in store.files:
        table = pq.read_table(file.path.open())
        users = table["user_id"].to_pylist()
        folder = file.path.parent.name
        assert users == sorted(users, key=lambda u: u.encode() if isinstance(u, str) else u)
        assert all(f"bucket={bucket_of(u, store.manifest.num_buckets):04d}" == folder for u in users)
        for user, events in zip(users, table["events"].to_pylist(), strict=True):
            histories[user] = [{"user": user, **e} for e in events]
    for column in columns:
        flat = np.array([e[column] for events in histories.values() for e in events])
        raw = iter(store.vocabulary(column).decode(flat).to_pylist())
        for events in histories.values():
            for e in events:
                e[column] = next(raw)
    return histories


def pick(histories: dict, names: list[str]) -> dict:
    return {user: [tuple(e[n] for n in names) for e in events] for user, events in histories.items()}


# A short life: less compiling, fewer tasks.
QUICK = {
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    "spark.sql.shuffle.partitions": "3",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
