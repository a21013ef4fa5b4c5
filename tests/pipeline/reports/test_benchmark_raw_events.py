"""The benchmark's raw log: its laws, its files, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.pipeline.reports.benchmarks import raw_events
from elastic_rec.pipeline.reports.benchmarks.raw_events import FIRST_S, YEAR_S, draw, write_events


def read(paths) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in paths])


def test_files_hold_the_events_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_events, "FILE_EVENTS", 1000)
    paths = write_events(tmp_path / "a", num_users=50, num_events=2500, num_items=30, seed=3)
    assert [path.name for path in paths] == [f"events-{number:05d}.parquet" for number in range(3)]
    assert [pq.read_metadata(path).num_rows for path in paths] == [1000, 1000, 500]
    events = read(paths)
    assert events.schema == pa.schema([(name, pa.int64()) for name in ("user_id", "item_id", "timestamp")])
    low, high = (np.array([f(events[name].to_numpy()) for name in events.column_names]) for f in (np.min, np.max))
    assert (low >= [1, 1, FIRST_S]).all() and (high <= [50, 30, FIRST_S + YEAR_S - 1]).all()
    assert (np.diff(events["timestamp"].to_numpy()) < 0).mean() > 0.4, "in no order"
    again = write_events(tmp_path / "b", num_users=50, num_events=2500, num_items=30, seed=3)
    other = write_events(tmp_path / "c", num_users=50, num_events=2500, num_items=30, seed=4)
    assert read(again) == events and read(other) != events


def test_items_follow_zipf_and_users_a_heavy_tail(tmp_path):
    events = read(write_events(tmp_path, num_users=2000, num_events=400_000, num_items=100, seed=0))
    items = np.sort(np.bincount(events["item_id"].to_numpy())[1:])[::-1]
    expected = 400_000 / np.arange(1, 101) / np.sum(1 / np.arange(1, 101))
    assert np.abs(items / expected - 1).max() < 0.1
    users = np.bincount(events["user_id"].to_numpy())[1:]
    assert users.max() > 20 * np.median(users), "log-normal with sigma 1.5"


def test_draw_gives_every_id_its_weight():
    ids = draw(np.cumsum([1.0, 0.0, 3.0]), np.random.default_rng(0), 40_000)
    share = np.bincount(ids, minlength=4) / len(ids)
    assert share[2] == 0 and abs(share[1] - 0.25) < 0.01 and abs(share[3] - 0.75) < 0.01
