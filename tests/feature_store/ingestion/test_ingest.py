"""Ingest gives, value for value, what a plain Python sort gives: ties, filters, id types, formats, file order."""

import gzip
import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from feature_store_reference import (
    make_store,
    pick,
    random_events,
    reference_histories,
    stored_histories,
    write_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.writer import cut_histories
from elastic_rec.feature_store.table.schema import history_schema
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.vocabulary import UNKNOWN

CONTEXT = ["action", "rating"]
NAMES = ["timestamp", "item", *CONTEXT]


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_round_trip_with_ties_over_several_files(tmp_path, suffix, strings):
    events = random_events(900, strings=strings)
    parts = [events[:300], events[300:310], events[310:]]
    # Names that do not sort in input order: the order of `input` counts, not the alphabet.
    inputs = [
        write_events(tmp_path / f"{name}.{suffix}", part) for name, part in zip(["b", "c[1]", "a"], parts, strict=True)
    ]
    figures = ingest(
        IngestConfig(input=inputs, out=str(tmp_path / "s"), context_columns=CONTEXT, row_group_events=50, num_buckets=4)
    )
    store = Store.open(tmp_path / "s")
    want = reference_histories(events)
    assert pick(stored_histories(store, ["item", *CONTEXT]), NAMES) == pick(want, NAMES)
    assert figures["events"] == store.num_events == 900
    assert figures["users"] == store.num_users == len(want)
    assert sum(len(f.row_groups) for f in store.files) > 6
    # The test would prove nothing about ties without many of them.
    tied = sum(a["timestamp"] == b["timestamp"] for h in want.values() for a, b in pairwise(h))
    assert tied > 200


def test_row_order_survives_a_parallel_csv_scan(tmp_path):
    """One user, one timestamp: the history must be the file from top to bottom, over many scan blocks and threads."""
    n = 400_000
    table = pa.table({"user_id": np.zeros(n, np.int64), "item_id": np.arange(n), "timestamp": np.zeros(n, np.int64)})
    pa_csv.write_csv(table, tmp_path / "e.csv")
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=20_000)
    for name in ("e.csv", "e.parquet"):
        ingest(IngestConfig(input=[str(tmp_path / name)], out=str(tmp_path / "s"), threads=4, overwrite=True))
        store = Store.open(tmp_path / "s")
        items = pq.read_table(store.files[0].path, partitioning=None)["events"].chunk(0).values.field("item")
        assert np.array_equal(store.vocabulary("item").decode(items.to_numpy()), np.arange(n))


def test_formats_give_equal_stores(tmp_path):
    events = random_events(500)
    manifests = []
    for suffix in ("csv", "tsv", "parquet"):
        source = write_events(tmp_path / f"e.{suffix}", events)
        ingest(IngestConfig(input=[source], out=str(tmp_path / suffix), context_columns=CONTEXT))
        manifest = json.loads((tmp_path / suffix / "manifest.json").read_text())
        manifests.append({k: v for k, v in manifest.items() if k not in ("source", "hash")})
    assert manifests[0] == manifests[1] == manifests[2]  # digests of all data files among it


def test_same_input_gives_the_same_hash_whatever_the_threads(tmp_path):
    source = write_events(tmp_path / "e.parquet", random_events(3000, num_users=200))
    hashes = set()
    for threads, memory in ((1, "1GB"), (4, "64MB")):
        out = str(tmp_path / f"s{threads}")
        ingest(IngestConfig(input=[source], out=out, threads=threads, memory_limit=memory))
        hashes.add(Store.open(out).manifest.hash)
    assert len(hashes) == 1


def test_event_id_orders_ties(tmp_path):
    events = random_events(600)
    store = make_store(tmp_path, events, event_id_column="event_id")
    names = ["timestamp", "event_id", "item"]
    want = pick(reference_histories(events, event_id=True), names)
    assert pick(stored_histories(store, ["item"]), names) == want
    assert want != pick(reference_histories(events), names)


def test_filters_items_first_then_users_once(tmp_path):
    events = random_events(400, num_items=120, num_users=60)
    limits = {"min_item_events": 4, "min_user_events": 3}
    want = reference_histories(events, **limits)
    store = make_store(tmp_path, events, context_columns=["action"], **limits)
    assert pick(stored_histories(store, ["item", "action"]), NAMES[:3]) == pick(want, NAMES[:3])
    kept = [e for h in want.values() for e in h]
    assert 0 < len(want) < len({e["user"] for e in events})
    vocabulary = store.vocabulary("item")
    assert vocabulary.counts.sum() == len(kept) == store.num_events  # counts are of kept events
    assert vocabulary.size == len({e["item"] for e in kept}) + 2
    dropped = store.manifest.filters
    assert dropped["dropped_events"] == len(events) - len(kept)
    assert dropped["dropped_items"] == len({e["item"] for e in events}) - len({e["item"] for e in kept})


def test_vocabulary_order_encode_decode(tmp_path):
    events = [{"user": 1, "item": i, "timestamp": t} for t, i in enumerate([30, 20, 20, 10, 30, 5])]
    vocabulary = make_store(tmp_path, events).vocabulary("item")
    assert vocabulary.ids.to_pylist() == [20, 30, 5, 10]  # by falling count, then rising id
    assert vocabulary.counts.tolist() == [0, 0, 2, 2, 1, 1]
    assert vocabulary.encode(pa.array([5, 99, None, 20], pa.int32())).tolist() == [4, UNKNOWN, UNKNOWN, 2]
    assert vocabulary.encode(pa.chunked_array([[30], [10]])).tolist() == [3, 5]
    assert vocabulary.decode(np.array([0, 1, 2, 5])).to_pylist() == [None, None, 20, 10]
    with pytest.raises(Exception, match=r"index 6 is outside 0\.\.5"):
        vocabulary.decode(np.array([6]))
    with pytest.raises(Exception, match="holds int64 ids, got string"):
        vocabulary.encode(pa.array(["5"]))


def test_text_ids_are_integers_only_where_all_are_written_as_integers(tmp_path):
    for ids, want in ((["7", "-10", "3"], [-10, 3, 7]), (["7", "07", "x"], ["07", "7", "x"])):
        rows = "".join(f"u,{i},{t}\n" for t, i in enumerate(ids))
        (tmp_path / "e.csv").write_text("user_id,item_id,timestamp\n" + rows)
        ingest(IngestConfig(input=[str(tmp_path / "e.csv")], out=str(tmp_path / "s"), overwrite=True))
        assert Store.open(tmp_path / "s").vocabulary("item").ids.to_pylist() == want


def test_null_context_is_unknown_and_integral_floats_are_times(tmp_path):
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp,action\n1,5,20.0,\n1,6,1e1,buy\n")
    ingest(IngestConfig(input=[str(tmp_path / "e.csv")], out=str(tmp_path / "s"), context_columns=["action"]))
    (events,) = pq.read_table(Store.open(tmp_path / "s").files[0].path, partitioning=None)["events"].to_pylist()
    assert [(e["timestamp"], e["action"]) for e in events] == [(10, 2), (20, UNKNOWN)]


def test_typed_timestamps_large_strings_and_dictionaries(tmp_path):
    table = pa.table(
        {
            "user_id": pa.array(["b", "a"]).dictionary_encode(),
            "item_id": pa.array(["x", "y"], pa.large_string()),
            "timestamp": pa.array([1500, 2000], pa.timestamp("ms")),
        }
    )
    pq.write_table(table, tmp_path / "e.parquet")
    ingest(IngestConfig(input=[str(tmp_path / "e.parquet")], out=str(tmp_path / "s"), timestamp_unit="ms"))
    stored = stored_histories(Store.open(tmp_path / "s"), ["item"])
    assert {u: (e[0]["timestamp"], e[0]["item"]) for u, e in stored.items()} == {"a": (2000, "y"), "b": (1500, "x")}


def test_folder_glob_and_gzip_input(tmp_path):
    events = random_events(90)
    folder = tmp_path / "in" / "deep"
    folder.mkdir(parents=True)
    for number in range(3):
        name = write_events(folder / f"p{number}.csv", events[number * 30 : number * 30 + 30])
    with open(name, "rb") as plain, gzip.open(name + ".gz", "wb") as packed:
        packed.write(plain.read())
    (folder / "p2.csv").unlink()
    (folder / "_SUCCESS").touch()
    (folder / "_bad.csv").touch()
    want = pick(reference_histories(events), NAMES[:2])
    for entry in (tmp_path / "in", folder / "p*.csv*"):
        ingest(IngestConfig(input=[str(entry)], out=str(tmp_path / "s"), overwrite=True))
        assert pick(stored_histories(Store.open(tmp_path / "s"), ["item"]), NAMES[:2]) == want


def test_user_vocabulary_and_user_ids(tmp_path):
    events = random_events(500, strings=True)
    store = make_store(tmp_path, events)
    users = list(stored_histories(store, []))
    rows = np.random.default_rng(0).permutation(store.num_users)
    assert store.user_ids(rows).to_pylist() == [users[row] for row in rows]
    assert store.user_ids(np.array([2, -1, 2])).to_pylist() == [users[2], None, users[2]]
    assert store.user_ids(np.array([-1])).to_pylist() == [None]
    assert sorted(store.vocabulary("user").ids.to_pylist()) == sorted(users)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=20),
    batch_size=st.integers(1, 12),
    row_group_events=st.integers(1, 15),
)
def test_writer_does_not_depend_on_batches_and_loses_nothing(lengths, batch_size, row_group_events):
    """lengths: (events of a user, does a new bucket begin with him)."""
    users = np.repeat(np.arange(len(lengths)), [n for n, _ in lengths])
    buckets = np.cumsum([new for _, new in lengths])[users]
    flat = pa.table(
        {
            "bucket": buckets.astype(np.int32),
            "user_id": users,
            "timestamp": np.arange(len(users)) * 10,
            "item": np.arange(len(users)) + 2,
        }
    )
    schema = history_schema("int64", {"timestamp": "int64", "item": "int64"})
    groups = list(cut_histories(flat.to_batches(batch_size), schema=schema, row_group_events=row_group_events))
    # By hand: a group goes on while users fit and the bucket is the same.
    want, at = [], 0
    for user, (length, _) in enumerate(lengths):
        bucket = int(buckets[at])
        if want and want[-1][0] == bucket and want[-1][2] + length <= row_group_events:
            want[-1][1].append(user)
            want[-1][2] += length
        else:
            want.append([bucket, [user], length])
        at += length
    got = [[bucket, table["user_id"].to_pylist(), len(table["events"].chunk(0).values)] for bucket, table, _ in groups]
    assert got == want
    events = [e for _, table, _ in groups for history in table["events"].to_pylist() for e in history]
    assert [(e["timestamp"], e["item"]) for e in events] == [(10 * i, i + 2) for i in range(len(users))]
    assert all(
        times == (t["events"][0][0]["timestamp"].as_py(), t["events"][-1][-1]["timestamp"].as_py())
        for _, t, times in groups
    )
