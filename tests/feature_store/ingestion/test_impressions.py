"""Impressions: joined as plain Python would, seen as of their time, the same batches on any number of ranks."""

from __future__ import annotations

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_store_reference import make_store, random_events, write_events
from hypothesis import given, settings
from hypothesis import strategies as st
from impressions import config_of, random_impressions

from elastic_rec.feature_store.batches.impression_batch import make_impression_batch
from elastic_rec.feature_store.batches.splits import ImpressionSplit
from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions
from elastic_rec.feature_store.reading.impression_reader import ImpressionReader
from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError

ALL = ImpressionSplit(valid_time="2090-01-01", test_time="2091-01-01")
COLUMNS = ["item", "action"]


@pytest.fixture(scope="module", params=[False, True], ids=["int", "string"])
def case(request, tmp_path_factory):
    """(store, events, impressions in input order, attributes of items)."""
    folder = tmp_path_factory.mktemp("impressions")
    events = random_events(800, num_users=60, times=50, strings=request.param)
    store = make_store(folder, events, context_columns=["action"], row_group_events=60)
    users = sorted({e["user"] for e in events})
    items = sorted({e["item"] for e in events})
    strangers = ["ünknown", "zz", "a"] if request.param else [99_999, -77_777, 5_000]
    rows = random_impressions([*users, *strangers], [*items, "never" if request.param else 10**6])
    for number, part in enumerate((rows[:250], rows[250:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"impressions-{number}.parquet", row_group_size=100)
    attributes = {
        item: {"item": item, "genres": ["a", "b", "c"][: i % 4], "year": 1990 + i % 3}
        for i, item in enumerate(items[:-2])
    }
    pq.write_table(pa.Table.from_pylist(list(attributes.values())), folder / "items.parquet")
    figures = ingest_impressions(config_of(folder), out=str(store.path), threads=1)
    assert figures["impressions"] == 400 and figures["candidates"] == sum(len(r["candidates"]) for r in rows)
    return store, events, rows, attributes


def make(store, **settings) -> ImpressionReader:
    defaults = {
        "columns": COLUMNS,
        "split": ALL,
        "stage": "train",
        "global_batch_size": 7,
        "max_impressions_per_user": 3,
    }
    return ImpressionReader(store, **{**defaults, "max_history": 1000, "shuffle": True, "seed": 3, **settings})


def seen_by(events: list[dict], user, time: int, max_history: int) -> list[tuple]:
    """Raw (item, action) of the user's events strictly before `time`, the newest max_history of them."""
    mine = sorted((e for e in events if e["user"] == user), key=lambda e: e["timestamp"])
    return [(e["item"], e["action"]) for e in mine if e["timestamp"] < time][-max_history:]


def records(store, reader, batches) -> list[dict]:
    """Every impression of the batches as raw values, history and attributes included."""
    table, found = ImpressionTable(store), []
    items, actions = store.vocabulary("item"), store.vocabulary("action")
    vocabularies = {name: table.vocabulary(name) for name in [*table.context, *table.item_context]}

    def bag(bags, row, name):
        values = bags[name].values[bags[name].offsets[row] : bags[name].offsets[row + 1]]
        return vocabularies[name].decode(values).to_pylist()

    for b in batches:
        assert np.all(np.diff(b.group) >= 0) and b.group.max() < len(b.histories.rows)
        for i in np.flatnonzero(b.rows >= 0):
            c = slice(b.candidates.offsets[i], b.candidates.offsets[i + 1])
            h, t = b.histories, slice(b.starts[i], b.ends[i])
            u = b.group[i]
            assert h.offsets[u] <= b.starts[i] <= b.ends[i] <= h.offsets[u + 1]
            raw = (v.decode(h.columns[n][t]).to_pylist() for n, v in (("item", items), ("action", actions)))
            found.append(
                {
                    "row": int(b.rows[i]),
                    "user": store.user_ids(h.rows[u : u + 1])[0].as_py(),
                    "timestamp": int(b.times_s[i]),
                    "seen": list(zip(*raw, strict=True)),
                    "candidates": items.decode(b.candidates.values[c]).to_pylist(),
                    "labels": [[None if np.isnan(x) else x for x in row] for row in b.labels[c].tolist()],
                    **{name: bag(b.context, i, name) for name in table.context},
                    **{
                        name: [bag(b.item_context, k, name) for k in range(c.start, c.stop)]
                        for name in table.item_context
                    },
                }
            )
    return found


def expected(case, max_history: int) -> list[dict]:
    _, events, rows, attributes = case
    known_users, known_items = {e["user"] for e in events}, {e["item"] for e in events}
    return [
        {
            "user": r["user_id"] if r["user_id"] in known_users else None,
            "timestamp": r["timestamp"],
            "seen": seen_by(events, r["user_id"], r["timestamp"], max_history),
            "candidates": [c if c in known_items else None for c in r["candidates"]],
            "labels": [list(pair) for pair in zip(r["click"], r["watched"], strict=True)],
            "device": [r["device"]],
            "tags": r["tags"],
            "genres": [attributes[c]["genres"] if c in attributes else [] for c in r["candidates"]],
            "year": [[attributes[c]["year"]] if c in attributes else [None] for c in r["candidates"]],
        }
        for r in rows
    ]


def key(record: dict) -> str:
    return repr({name: value for name, value in record.items() if name != "row"})


@pytest.mark.parametrize("max_history", [3, 1000])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_impression_once_with_its_history_as_of_its_time(case, max_history, shuffle):
    """The leak test: histories are rebuilt from the raw events, ties with the impression's time left out."""
    reader = make(case[0], max_history=max_history, shuffle=shuffle)
    got = records(case[0], reader, reader.epoch(1))
    assert sorted(r["row"] for r in got) == list(range(400))
    assert sorted(map(key, got)) == sorted(map(key, expected(case, max_history)))
    assert any(e["timestamp"] == r["timestamp"] and e["user"] == r["user_id"] for r in case[2] for e in case[1]), "ties"


def test_no_event_at_or_behind_the_newest_impression_of_a_group_is_in_the_batch(case):
    for b in make(case[0], max_impressions_per_user=100).epoch(0):
        h = b.histories
        newest = np.full(len(h.rows), -1)
        np.maximum.at(newest, b.group, b.times_s)
        assert np.all(h.times_s < np.repeat(newest, np.diff(h.offsets)))


def test_a_history_is_in_a_batch_once_for_all_its_impressions(case):
    (batch,) = make(case[0], max_impressions_per_user=1000, global_batch_size=10_000).epoch(0)
    assert len(batch.rows) == 400 and len(batch.histories.times_s) <= len(case[1])
    known = batch.histories.rows[batch.histories.rows >= 0]
    assert len(np.unique(known)) == len(known)
    assert int((batch.ends - batch.starts).sum()) > 3 * len(batch.histories.times_s)


@pytest.mark.parametrize("global_batch_size", [3, 7, 1000])
def test_batches_do_not_depend_on_ranks(case, global_batch_size):
    def contents(world_size: int, start: int = 0) -> list[list[str]]:
        readers = [
            make(case[0], global_batch_size=global_batch_size, rank=r, world_size=world_size) for r in range(world_size)
        ]
        batches = []
        for shares in zip(*(r.epoch(2, start) for r in readers), strict=True):
            batches.append(sorted(map(repr, records(case[0], readers[0], shares))))
            assert len({share.histories.num_global_rows for share in shares}) == 1
        return batches

    want = contents(1)
    assert len(want) == make(case[0], global_batch_size=global_batch_size).num_batches
    for world_size in (2, 3, 40):  # 40: more than row groups in a block
        assert contents(world_size) == want
    assert contents(2, start=len(want) // 2) == want[len(want) // 2 :]


def test_order_is_drawn_anew_each_epoch(case):
    def order(epoch: int, seed: int = 3) -> list[int]:
        return [int(row) for b in make(case[0], seed=seed).epoch(epoch) for row in b.rows]

    assert order(0) != order(1) and order(0) != order(0, seed=4) and order(0) == order(0)
    with pytest.raises(DataError, match="start_batch 999 is outside"):
        next(make(case[0]).epoch(0, 999))


def test_stages_part_the_impressions_by_time(case):
    split = ImpressionSplit(valid_time="60%", test_time="80%")
    times = {}
    for stage in ("train", "valid", "test"):
        reader = make(case[0], split=split, stage=stage)
        times[stage] = [int(t) for b in reader.epoch(0) for t in b.times_s]
    assert sum(map(len, times.values())) == 400 and 200 < len(times["train"]) < 260
    assert max(times["train"]) < min(times["valid"]) and max(times["valid"]) < min(times["test"])
    with pytest.raises(ValueError, match="must be before"):
        make(case[0], split=ImpressionSplit(valid_time="80%", test_time="80%"))
    late = ImpressionSplit(valid_time="2030-01-01", test_time="2031-01-01")
    message = "no impressions in stage valid: train 400, valid 0, test 0 of 400, which were shown from 1970-01-12T13:4"
    with pytest.raises(DataError, match=message):
        make(case[0], split=late, stage="valid")


def test_batch_for_a_model(case):
    store = case[0]
    b = next(make(store, global_batch_size=20).epoch(0))
    batch = make_impression_batch(b).to("cpu")
    B, I, C = len(b.histories.rows), len(b.rows), len(b.candidates.values)
    assert batch.features.keys() == ["item", "action", "gap", "candidate"] and batch.features.stride() == B
    assert batch.features["candidate"].values().tolist() == b.candidates.values.tolist()
    lengths = b.candidates.lengths
    want = [int(lengths[b.group == v].sum()) for v in range(B)]
    assert batch.features["candidate"].lengths().tolist() == want
    assert batch.context.keys() == ["device", "tags"] and batch.context.stride() == I
    assert batch.item_context.keys() == ["genres", "year"] and batch.item_context.stride() == C
    assert batch.item_context["genres"].lengths().tolist() == np.diff(b.item_context["genres"].offsets).tolist()
    assert batch.impression.tolist() == np.repeat(np.arange(I), lengths).tolist()
    nothing = np.isnan(b.labels)
    assert batch.labels.shape == (C, 2) and not batch.labels.isnan().any()
    assert np.array_equal(batch.label_weights.numpy() == 0, nothing) and nothing.any()
    assert batch.normaliser.tolist() == (~nothing).sum(axis=0).tolist()
    gaps = [
        -1 if s == e else t - int(b.histories.times_s[e - 1])
        for s, e, t in zip(b.starts, b.ends, b.times_s, strict=True)
    ]
    assert batch.query_gap_s.tolist() == gaps and min(g for g in gaps if g != -1) > 0
    padding = make_impression_batch(list(make(store, rank=39, world_size=40).epoch(0))[-1])
    assert padding.labels.shape == (0, 2) and padding.impression_rows.tolist() == [-1]
    assert padding.context.stride() == 1 and padding.features.stride() == 1


def test_a_table_outlives_appends_but_not_another_store(tmp_path):
    events = random_events(300, num_users=20)
    store = make_store(tmp_path, events, context_columns=["action"])
    rows = random_impressions(sorted({e["user"] for e in events}), sorted({e["item"] for e in events}), num=50)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "impressions-0.parquet")
    settings = {"item_input": None, "item_context_columns": []}
    with pytest.raises(DataError, match=r"has no impressions; .*ingest.py impressions"):
        make(store)
    ingest_impressions(config_of(tmp_path, **settings), out=str(store.path), threads=1)
    before = sorted(map(repr, records(store, None, make(store).epoch(0))))
    late = [{**e, "timestamp": 2_000_000, "user": 500 + i % 7, "item": 700} for i, e in enumerate(events[:20])]
    append(AppendConfig(input=[write_events(tmp_path / "late.parquet", late)], store=str(store.path), threads=1))
    grown = Store.open(store.path)
    assert grown.num_users > store.num_users
    assert sorted(map(repr, records(grown, None, make(grown).epoch(0)))) == before, "rows moved, the join did not"
    other = make_store(tmp_path / "other", random_events(300, num_items=9), context_columns=["action"])
    shutil.move(store.path / "impressions", other.path / "impressions")
    with pytest.raises(DataError, match="written with other item ids"):
        make(other)


def test_coarser_clocks_never_let_the_future_through(tmp_path):
    """Impressions in ms on histories in s, and the other way round: an event of the same second stays out."""
    for unit, event_times, time, other, want in (
        ("s", [99, 100], 100_900, "ms", [99]),
        ("ms", [99_999, 100_000, 100_001], 100, "s", [99_999]),
    ):
        folder = tmp_path / unit
        events = [{"user": 1, "item": t, "timestamp": t} for t in event_times]
        store = make_store(folder, events, timestamp_unit=unit)
        row = {"user_id": 1, "timestamp": time, "item_id": event_times[0], "label": 1}
        pq.write_table(pa.Table.from_pylist([row]), folder / "impressions.parquet")
        config = ImpressionConfig(
            input=[str(folder / "impressions.parquet")], label_columns=["label"], timestamp_unit=other
        )
        ingest_impressions(config, out=str(store.path), threads=1)
        (b,) = make(store, columns=["item"]).epoch(0)
        assert store.vocabulary("item").decode(b.histories.columns["item"]).to_pylist() == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": None}, "row 2: user is empty"),
        ({"timestamp": -5}, "row 2: timestamp is empty, negative"),
        ({"candidates": []}, "row 2: there is no candidate"),
        ({"candidates": [1, None]}, "row 2: a candidate is empty"),
        ({"click": [1.0]}, "row 2: a label list is not as long"),
        ({"click": [1.0, -1.0]}, r"row 2: label 'click' is -1, not from 0 to 1; .*label_thresholds.click=4"),
        ({"watched": [1.0, 4.0]}, "row 2: label 'watched' is 4, not from 0 to 1"),
        ({"click": [float("nan"), 1.0]}, "row 2: label 'click' is nan, .* write null where there is no label"),
    ],
)
def test_bad_rows_are_named_and_nothing_is_written(tmp_path, change, message):
    store = make_store(tmp_path, random_events(50), context_columns=["action"])
    good = {"user_id": 1, "timestamp": 5, "candidates": [1, 2], "click": [1.0, 0.0], "watched": [1.0, 0.0]}
    pq.write_table(pa.Table.from_pylist([good, good | change, good]), tmp_path / "impressions-0.parquet")
    config = config_of(tmp_path, item_input=None, item_context_columns=[], context_columns=[])
    with pytest.raises(DataError, match=message):
        ingest_impressions(config, out=str(store.path), threads=1)
    assert not (store.path / "impressions").is_dir() and not (store.path / ".append").is_dir()


def test_labels_on_another_scale_truths_and_nulls(tmp_path):
    """A threshold makes 0 and 1 of stars, true is 1, null is no label; a label nobody has is refused."""
    store = make_store(tmp_path, random_events(50), context_columns=["action"])
    rows = [
        {"user_id": 1, "timestamp": 5, "candidates": [1, 2, 3], "stars": [3, 4, None], "bought": [True, False, None]},
        {"user_id": 1, "timestamp": 6, "candidates": [1], "stars": [5], "bought": [None]},
    ]
    kinds = {"stars": pa.list_(pa.int8()), "bought": pa.list_(pa.bool_()), "never": pa.list_(pa.float64())}
    table = pa.table({name: pa.array([row.get(name) for row in rows], kinds.get(name)) for name in rows[0]})
    pq.write_table(table, tmp_path / "impressions-0.parquet")
    bare = {"item_input": None, "item_context_columns": [], "context_columns": []}
    labels = {"label_columns": ["stars", "bought"], "label_thresholds": {"stars": 4}}
    ingest_impressions(config_of(tmp_path, **bare, **labels), out=str(store.path), threads=1)
    (batch,) = make(store, shuffle=False).epoch(0)
    assert np.array_equal(batch.labels.T, [[0, 1, np.nan, 1], [1, 0, np.nan, np.nan]], equal_nan=True)
    with pytest.raises(DataError, match="row 1: label 'stars' is 3, not from 0 to 1"):
        ingest_impressions(config_of(tmp_path, **bare, label_columns=["stars"]), out=str(store.path), threads=1)
    with pytest.raises(ValueError, match="'click' is not in label_columns"):
        config_of(tmp_path, **bare, label_columns=["stars"], label_thresholds={"click": 4})
    nothing = pa.array([[None] * 3, [None]], kinds["never"])
    pq.write_table(table.append_column("never", nothing), tmp_path / "impressions-0.parquet")
    with pytest.raises(DataError, match="label 'never' is null for all candidates of 2 impressions"):
        ingest_impressions(config_of(tmp_path, **bare, label_columns=["never"]), out=str(store.path), threads=1)
    assert ImpressionTable(store).labels == ["stars", "bought"], "what was there stays"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 5), st.integers(0, 3))
def test_row_groups_end_where_the_data_says(tmp_path_factory, cap, batch_rows, num_groups, seed):
    from elastic_rec.feature_store.ingestion.impressions.writer import cut_impressions

    rng = np.random.default_rng(seed)
    n = 30
    bucket, user = np.sort(rng.integers(0, 2, n)), rng.integers(0, 8, n)
    user = np.concatenate([np.sort(user[bucket == b]) for b in (0, 1)])
    lists = [[1] * int(k) for k in rng.integers(1, 4, n)]
    table = pa.table({"bucket": bucket, "user_id": user, "row": np.arange(n), "candidates": lists})
    firsts = {0: sorted(rng.integers(0, 8, num_groups).tolist())}
    whole = [(b, t["row"].to_pylist()) for b, t in cut_impressions(table.to_batches(), firsts, cap=cap)]
    parts = [
        (b, t["row"].to_pylist())
        for b, t in cut_impressions(table.to_batches(max_chunksize=batch_rows), firsts, cap=cap)
    ]
    assert whole == parts and [r for _, rows in whole for r in rows] == list(range(n))
    for b, rows in whole:
        assert len(rows) == 1 or sum(len(lists[r]) for r in rows) <= cap
        groups = {sum(user[r] >= f for f in firsts.get(b, [0])[1:]) for r in rows}
        assert len(groups) == 1 and {bucket[r] for r in rows} == {b}
