"""Batches by a budget of events, by like length, over very long users; histories of single users by id."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from feature_store_reference import bucket_of, make_store, random_events, reference_histories
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_rec.feature_store.reading import lookup
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.reading.lookup import HistoryLookup
from elastic_rec.feature_store.table.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Some 100 users of very different lengths, one with 900 events."""
    events = random_events(1200, num_users=300, times=10_000_000, strings=True)
    events += [{**e, "user": "long", "timestamp": i} for i, e in enumerate(events[:900])]
    return make_store(tmp_path_factory.mktemp("batching"), events, context_columns=["action"], row_group_events=60)


def make(store: Store, **settings) -> HistoryReader:
    defaults = {"columns": ["item"], "global_batch_size": 25, "shuffle": True, "seed": 1, "row_groups_per_block": 5}
    return HistoryReader(store, **{**defaults, **settings})


def shares(store: Store, world_size: int, start: int = 0, **settings) -> list[list[dict[int, int]]]:
    """Per batch and rank: row -> events."""
    readers = [make(store, rank=r, world_size=world_size, **settings) for r in range(world_size)]
    return [
        [dict(zip(h.rows[h.rows >= 0].tolist(), np.diff(h.offsets).tolist(), strict=False)) for h in ranks]
        for ranks in zip(*(reader.epoch(2, start) for reader in readers), strict=True)
    ]


def whole(batch: list[dict[int, int]]) -> dict[int, int]:
    return {row: events for rank in batch for row, events in rank.items()}


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 300), st.integers(5, 500), st.booleans(), st.integers(0, 99))
def test_a_budget_bounds_the_events_of_every_batch(store, budget, max_history, bucket_lengths, seed):
    options = {"events_per_batch": budget, "max_history": max_history, "bucket_lengths": bucket_lengths, "seed": seed}
    batches = [whole(batch) for batch in shares(store, 1, **options)]
    assert len(batches) == make(store, **options).num_batches_in(2)
    assert sorted(row for batch in batches for row in batch) == list(range(store.num_users))
    for batch in batches:
        costs = [min(events, max_history) for events in batch.values()]
        assert sum(costs) <= budget or len(costs) == 1, "only a user who alone exceeds it"
        assert len(costs) <= 25
    tight = [sum(min(e, max_history) for e in b.values()) for b in batches]
    assert len(tight) < 2 * sum(tight) / budget + len(batches[0]) + store.num_users / 25 + 40


@pytest.mark.parametrize("options", [{"events_per_batch": 80}, {"bucket_lengths": True}], ids=["budget", "lengths"])
def test_batches_are_the_same_on_all_ranks_and_after_a_resume(store, options):
    want = [whole(batch) for batch in shares(store, 1, **options)]
    for world_size in (2, 3):
        assert [whole(batch) for batch in shares(store, world_size, **options)] == want
    assert [whole(batch) for batch in shares(store, 2, 3, **options)] == want[3:]
    reader = make(store, **options)
    rest = [h.rows.tolist() for h in reader.resume(reader.cursor(2, 3))]
    assert [sorted(rows) for rows in rest] == [sorted(batch) for batch in want[3:]]


def test_users_of_like_length_stand_together(store):
    def spread(**options) -> float:
        batches = [list(whole(b).values()) for b in shares(store, 1, global_batch_size=8, **options)]
        return float(np.mean([np.std(np.log2(lengths)) for lengths in batches]))

    mixed, alike = spread(row_groups_per_block=100), spread(row_groups_per_block=100, bucket_lengths=True)
    assert alike < mixed / 2
    orders = [[h.rows.tolist() for h in make(store, bucket_lengths=True).epoch(e)] for e in (0, 1)]
    assert orders[0] != orders[1]


def test_lengths_are_read_without_decoding(store, monkeypatch):
    reader = make(store, events_per_batch=80)
    monkeypatch.setattr(reader.decoder, "decode", lambda group: 1 / 0)
    assert reader.num_batches_in(0) > 10
    with pytest.raises(ValueError, match="ask num_batches_in"):
        _ = reader.num_batches


def test_cost_is_balanced_over_ranks(tmp_path):
    """Users of 5 to 100 events: every rank has about its share of a batch's events, steps alike."""
    rng = np.random.default_rng(0)
    events = [{"user": u, "item": 1, "timestamp": t} for u in range(600) for t in range(int(rng.integers(5, 100)))]
    store = make_store(tmp_path, events, row_group_events=500, num_buckets=4)
    batches = shares(store, 4, events_per_batch=3000, global_batch_size=600, row_groups_per_block=32)
    loads = np.array([[sum(rank.values()) for rank in batch] for batch in batches[:-1]])
    assert np.mean(loads.max(axis=1) / loads.mean(axis=1)) < 1.35


@pytest.mark.parametrize("strings", [False, True])
def test_single_users_by_id(tmp_path, strings, monkeypatch):
    events = random_events(700, num_users=90, times=10_000, strings=strings)
    store = make_store(tmp_path, events, context_columns=["action"], row_group_events=40)
    want, vocabulary = reference_histories(events), store.vocabulary("item")
    ids = [*itertools.islice(want, 30), "nobody" if strings else 10**9, "" if strings else -(10**9)]
    ids.append(ids[0])
    reads = HistoryLookup(store, columns=["action"])
    h = reads.histories(ids)
    for place, user in enumerate(ids):
        span = slice(h.offsets[place], h.offsets[place + 1])
        items = vocabulary.decode(h.columns["item"][span]).to_pylist()
        assert items == [e["item"] for e in want.get(user, [])], user
        assert (h.rows[place] == -1) == (user not in want)
        assert lookup.bucket_of(user, 3) == bucket_of(user, 3)
    assert store.user_ids(h.rows).to_pylist() == [user if user in want else None for user in ids]
    one = HistoryLookup(store, columns=[])
    decoded = []
    decode = one._decoder.decode
    monkeypatch.setattr(one._decoder, "decode", lambda group: decoded.append(group) or decode(group))
    one.histories([ids[3]])
    assert len(decoded) == 1, "one row group, not the store"
    assert len(one.histories([]).rows) == 0
