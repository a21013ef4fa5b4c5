"""Statistics of a store, streamed row group by row group, against plain Python over all events at once."""

from __future__ import annotations

import weakref
from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
from feature_store_reference import make_store, random_events, reference_histories, write_events
from ranking_data import make_ranking_store

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.inspection.statistics import (
    Tally,
    bin_starts,
    describe_impressions,
    gap_bins,
    has_impressions,
    measure,
    top_share,
)
from elastic_rec.feature_store.reading.row_groups import Decoder
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError

DAY_S = 24 * 3600


def test_tally_against_numpy():
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 300):
        data = rng.integers(-50, 50, size) ** 3
        tally = Tally()
        for part in np.array_split(data, 3):
            tally.add(part)
        values, counts = np.unique(data, return_counts=True)
        assert tally.values.tolist() == values.tolist() and tally.counts.tolist() == counts.tolist()
        assert tally.total == size
        for percent in (0, 1, 30, 50, 99, 100):
            assert tally.percentile(percent) == np.quantile(data, percent / 100, method="inverted_cdf")


def test_gap_bins_rise_and_are_exact_where_they_say_so():
    gaps = np.concatenate([np.arange(5000), 2 ** np.arange(13, 63), 2 ** np.arange(13, 63) - 1, [2**63 - 1]])
    gaps.sort()
    bins = gap_bins(gaps)
    assert (np.diff(bins) >= 0).all()
    starts = bin_starts(bins)
    assert starts[:128].tolist() == list(range(128)), "each small gap has a bin of its own"
    # The last few gaps are no float64: what rounds up to a power of two lies in its bin.
    assert (starts <= gaps.astype(float)).all() and (gaps - starts <= gaps / 64).all()
    octave = gap_bins(np.arange(2**20, 2**21))
    assert len(np.unique(octave)) == 64


def stretched(num: int = 3000) -> list[dict]:
    """Events over many days, some users with one event."""
    rng = np.random.default_rng(5)
    events = random_events(num, num_users=150, seed=3)
    for event in events:
        event["timestamp"] = 1_600_000_000 + int(rng.integers(0, 40 * DAY_S) ** 0.97)
    return [*events, {**events[0], "user": 10_000}, {**events[0], "user": 10_001}]


def test_measure_against_plain_python(tmp_path):
    events = stretched()
    store = make_store(tmp_path, events, context_columns=["action", "rating"], row_group_events=100)
    assert len(store.files) == 3 and sum(len(file.row_groups) for file in store.files) > 20
    found = measure(store)
    histories = reference_histories(events)
    times = {user: [e["timestamp"] for e in mine] for user, mine in histories.items()}
    lengths = [len(mine) for mine in times.values()]
    gaps = [b - a for mine in times.values() for a, b in pairwise(mine)]

    def counted(tally: Tally) -> dict:
        return dict(zip(tally.values.tolist(), tally.counts.tolist(), strict=True))

    assert counted(found.lengths) == Counter(lengths)
    assert counted(found.days) == Counter(t // DAY_S for mine in times.values() for t in mine)
    assert found.gap_bins.total == len(gaps) and found.longest_gap == max(gaps) == found.gap_percentile(100)
    for percent in (0, 1, 5, 25, 50, 95, 99):
        true = int(np.quantile(gaps, percent / 100, method="inverted_cdf"))
        assert true * (1 - 1 / 64) - 1 < found.gap_percentile(percent) <= true
    for limit in (1, 10, 50, 10_000):
        cut = found.cut(limit)
        assert cut.users == sum(n > limit for n in lengths) and cut.events == sum(max(0, n - limit) for n in lengths)
    for column in ("item", "action", "rating"):
        expected = Counter(e[column] for e in events)
        ranked = found.ranked(column)
        ids = store.vocabulary(column).decode(ranked).to_pylist()
        assert dict(zip(ids, found.counts[column][ranked].tolist(), strict=True)) == expected
        assert (np.diff(found.counts[column][ranked]) <= 0).all() and found.counts[column].sum() == len(events)


def test_no_more_than_a_few_row_groups_are_in_memory(tmp_path, monkeypatch):
    store = make_store(tmp_path, stretched(), row_group_events=50)
    decode, alive, most = Decoder.decode, weakref.WeakSet(), 0

    def watched(self, group):
        nonlocal most
        users = decode(self, group)
        alive.add(users)
        most = max(most, len(alive))
        return users

    monkeypatch.setattr(Decoder, "decode", watched)
    assert measure(store).lengths.total == store.num_users
    assert sum(len(file.row_groups) for file in store.files) > 30 and 1 <= most <= 4


def test_a_store_that_is_not_on_the_local_disk(tmp_path):
    config = IngestConfig(input=[write_events(tmp_path / "e.parquet", stretched(300))], out="memory://statistics/store")
    ingest(config)
    far, near = measure(Store.open(config.out)), measure(make_store(tmp_path, stretched(300)))
    assert far.lengths.counts.tolist() == near.lengths.counts.tolist()
    assert far.counts["item"].tolist() == near.counts["item"].tolist()


def test_units_and_unknown_values(tmp_path):
    events = [{**e, "timestamp": e["timestamp"] * 1000 + 7} for e in stretched(500)]
    for event in events[::3]:
        event["action"] = None
    settings = {"context_columns": ["action"], "timestamp_unit": "ms", "min_vocabulary_count": 20}
    found = measure(make_store(tmp_path, events, **settings))
    assert found.days.values.tolist() == sorted({e["timestamp"] // (DAY_S * 1000) for e in events})
    items = Counter(e["item"] for e in events)
    assert found.counts["item"][1] == sum(n for n in items.values() if n < 20) > 0, "rare items are unknown ones"
    assert found.counts["action"][1] >= len(events[::3])
    assert len(found.ranked()) == sum(n >= 20 for n in items.values())


def test_one_event_has_no_gap(tmp_path):
    found = measure(make_store(tmp_path, stretched()[:1]))
    assert found.gap_bins.total == 0 and found.longest_gap == 0 and found.lengths.percentile(99) == 1


def test_top_share():
    counts = np.array([50, 30, 10, 5, 5])
    assert top_share(counts, 0.01) == 0.5, "at least one id"
    assert top_share(counts, 0.4) == 0.8 and top_share(counts, 1.0) == 1.0
    assert top_share(np.zeros(0, np.int64), 0.1) == 0.0


def test_impressions_against_their_log(tmp_path):
    store = Store.open(make_ranking_store(tmp_path))
    assert has_impressions(store)
    found = describe_impressions(store)
    rows = pq.read_table(tmp_path / "impressions.parquet").to_pylist()
    assert found["impressions"] == len(rows) and found["candidates"] == sum(len(row["item_id"]) for row in rows)
    for name in ("click", "kept"):
        known = [x for row in rows for x in row[name] if x is not None]
        assert found["labels"][name]["known"] == len(known)
        assert found["labels"][name]["mean"] == pytest.approx(sum(known) / len(known), rel=1e-12)
    assert found["context"]["device"] == 2
    assert not has_impressions(make_store(tmp_path / "plain", random_events(50)))


def test_a_store_that_is_not_what_its_manifest_says(tmp_path):
    store = make_store(tmp_path, random_events(500))
    path = next((tmp_path / "store" / "bucket=0001").glob("part-*.parquet"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 255
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"bucket=0001/part-\w+\.parquet.*run the ingest again"):
        measure(store)
