"""The reader: one global order for every rank layout, each user once per epoch, values as plain pyarrow reads them."""

import itertools
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from feature_store_reference import make_store, random_events, stored_histories
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_rec.feature_store.reading import row_groups as decode_module
from elastic_rec.feature_store.reading.cursor import Cursor
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.counter_hash import counter_hash, counter_uniform
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.jagged import offsets_of, span_indices

COLUMNS = ["item", "action"]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Some 120 users in some 40 row groups of 20 events: many blocks, batches across blocks."""
    events = random_events(1500, num_users=400, times=10_000_000, strings=True)
    folder = tmp_path_factory.mktemp("reader")
    return make_store(folder, events, context_columns=["action"], row_group_events=20, timestamp_unit="ms")


def histories_by_row(store: Store) -> list:
    """Row number -> (times_s, items, actions), by plain pyarrow."""
    found = []
    for file in store.files:
        for events in pq.read_table(file.path, partitioning=None)["events"].to_pylist():
            found.append(
                tuple([e[n] // (1000 if n == "timestamp" else 1) for e in events] for n in ("timestamp", *COLUMNS))
            )
    return found


def make(store: Store, **settings) -> HistoryReader:
    return HistoryReader(store, **{"columns": COLUMNS, "global_batch_size": 7, "shuffle": True, "seed": 3, **settings})


def global_order(store: Store, *, world_size: int, epoch: int = 0, start_batch: int = 0, **settings) -> list[list[int]]:
    """Rows of each global batch, ascending, put together again from all ranks' shares."""
    readers = [make(store, rank=r, world_size=world_size, **settings) for r in range(world_size)]
    return merge([reader.epoch(epoch, start_batch) for reader in readers])


def merge(ranks: list) -> list[list[int]]:
    batches = []
    for shares in zip(*ranks, strict=True):
        num_users = shares[0].num_global_rows
        assert all(share.num_global_rows == num_users for share in shares)
        rows = [share.rows[share.rows >= 0].tolist() for share in shares]
        for share, real in zip(shares, rows, strict=True):
            if not real:
                assert share.rows.tolist() == [-1] and share.offsets.tolist() == [0, 0] and len(share.times_s) == 0
                assert all(len(share.columns[name]) == 0 for name in COLUMNS)
        batches.append(sorted(row for real in rows for row in real))
        assert len(batches[-1]) == num_users
    return batches


def test_values_are_those_of_plain_pyarrow(store):
    want = histories_by_row(store)
    assert len(store.files) == 3 and sum(len(f.row_groups) for f in store.files) > 30
    reader = make(store)
    for epoch in (0, 1):  # the second one comes from the cache
        seen = []
        for h in reader.epoch(epoch):
            assert all(a.dtype == np.int64 for a in (h.rows, h.offsets, h.times_s, *h.columns.values()))
            for i, row in enumerate(h.rows):
                span = slice(h.offsets[i], h.offsets[i + 1])
                got = (h.times_s[span].tolist(), h.columns["item"][span].tolist(), h.columns["action"][span].tolist())
                assert got == want[row]
            seen += h.rows.tolist()
        assert sorted(seen) == list(range(store.num_users)) and seen != sorted(seen)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("global_batch_size", [3, 7, 100, 10_000])
def test_order_does_not_depend_on_ranks(store, shuffle, global_batch_size):
    settings = {"shuffle": shuffle, "global_batch_size": global_batch_size}
    want = global_order(store, world_size=1, **settings)
    assert len(want) == make(store, **settings).num_batches == -(-store.num_users // global_batch_size)
    assert [len(batch) for batch in want[:-1]] == [global_batch_size] * (len(want) - 1)
    for world_size, blocks in ((2, 16), (3, 16), (50, 16)):  # 50 ranks: more than row groups in a block
        if world_size <= global_batch_size:
            assert global_order(store, world_size=world_size, **settings, row_groups_per_block=blocks) == want
    assert sorted(row for batch in want for row in batch) == list(range(store.num_users))


def test_last_batch_with_fewer_users_than_ranks_is_padded(store):
    """One user is left for three ranks; global_order checks what the other two get."""
    size = store.num_users - 1
    assert len(global_order(store, world_size=3, global_batch_size=size)[-1]) == 1


@pytest.mark.parametrize("world_size", [1, 3])
def test_start_batch_goes_on_where_the_epoch_was_left(store, world_size):
    want = global_order(store, world_size=1, epoch=2)
    for start in (0, 1, 5, len(want) - 1, len(want)):
        assert global_order(store, world_size=world_size, epoch=2, start_batch=start) == want[start:]
    with pytest.raises(DataError, match=r"start_batch \d+ is outside"):
        next(make(store).epoch(0, len(want) + 1))


def test_order_changes_with_epoch_and_seed_only(store):
    orders = [global_order(store, world_size=1, epoch=e, seed=s) for e, s in ((0, 3), (1, 3), (0, 4))]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]
    assert orders[0] == global_order(store, world_size=1, epoch=0, seed=3)


def test_shuffle_mixes_row_groups_and_moves_blocks(store):
    """Neighbours in the store rarely stay neighbours, and an epoch does not begin with the store's first users."""
    rows = np.array([r for h in make(store).epoch(0) for r in h.rows])
    assert np.mean(np.abs(np.diff(rows)) == 1) < 0.1
    assert rows[:20].max() - rows[:20].min() > store.num_users / 4
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 0.3


def test_each_rank_decodes_its_own_row_groups_only(store, monkeypatch):
    monkeypatch.setattr(decode_module, "CACHE_BYTES", 0)
    for world_size in (1, 3, 8):
        readers = [make(store, rank=r, world_size=world_size, global_batch_size=16) for r in range(world_size)]
        used = [sum(len(h.times_s) for h in reader.epoch(1)) for reader in readers]
        decoded = [reader.decoder.num_decoded_events for reader in readers]
        assert decoded == used and sum(used) == store.num_events, "read amplification 1"
        largest = max(events for file in store.files for _, events in file.row_groups)
        assert max(used) < 1.5 * store.num_events / world_size + largest


def test_what_every_rank_gets_of_a_batch_is_about_its_share(tmp_path):
    """Row groups of equal cost: a stretch of the order holds each of them in proportion."""
    events = [{"user": u, "item": 1, "timestamp": t} for u in range(960) for t in range(5)]
    store = make_store(tmp_path, events, row_group_events=100, num_buckets=1)
    readers = [make(store, columns=["item"], rank=r, world_size=4, global_batch_size=128) for r in range(4)]
    shares = np.array([[len(h.rows) for h in reader.epoch(0)] for reader in readers])
    assert np.all(np.abs(shares[:, :-1] - 32) <= 8)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_do_not_show_in_the_order_and_pass_on_errors(store, workers, monkeypatch):
    settings = {"row_groups_per_block": 3, "global_batch_size": 16}
    want = [h.rows.tolist() for h in make(store, workers=0, **settings).epoch(1)]
    reader = make(store, workers=workers, **settings)
    assert [h.rows.tolist() for h in reader.epoch(1)] == want
    before = threading.active_count()
    stopped = reader.epoch(1)
    next(stopped)
    stopped.close()
    assert threading.active_count() <= before, "a consumer that stops early leaves no thread behind"
    monkeypatch.setattr(reader.decoder, "decode", lambda group: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(reader.epoch(1))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.tuples(st.floats(0, 1), st.floats(0, 1)), st.booleans(), st.data())
def test_killed_and_resumed_on_other_ranks_and_workers_every_row_once(store, seed, batch, cuts, shuffle, data):
    """World sizes 1 -> 3 -> 2, workers 0 -> 2 -> 1, killed at random points; another batch size after the last kill."""
    settings = {"seed": seed, "shuffle": shuffle, "row_groups_per_block": data.draw(st.integers(1, 9))}
    G = max(3, batch)
    whole = merge([make(store, global_batch_size=G, **settings).epoch(4)])
    delivered, cursor = [], make(store, global_batch_size=G, **settings).cursor(4, 0)
    for stage, (world_size, workers) in enumerate(((1, 0), (3, 2), (2, 1))):
        readers = [
            make(store, rank=r, world_size=world_size, workers=workers, global_batch_size=G, **settings)
            for r in range(world_size)
        ]
        left = len(whole) - len(delivered)
        take = left if stage == 2 else int(cuts[stage] * left)
        ranks = [list(itertools.islice(reader.resume(cursor), take)) for reader in readers]
        delivered += merge(ranks)
        cursor = readers[0].cursor(4, len(delivered))
    assert delivered == whole
    assert sorted(row for rows in delivered for row in rows) == list(range(store.num_users))
    assert cursor.rows == store.num_users and merge([make(store, **settings).resume(cursor)]) == []


def test_a_cursor_goes_on_with_another_batch_size(store):
    first = list(itertools.islice(make(store, global_batch_size=7).epoch(0), 3))
    cursor = Cursor(seed=3, epoch=0, rows=21, manifest_hash=store.manifest.hash)
    rest = [row for h in make(store, global_batch_size=10).resume(cursor) for row in h.rows]
    assert sorted([*rest, *(row for h in first for row in h.rows)]) == list(range(store.num_users))


@pytest.mark.parametrize("harm", ["change", "truncate", "remove", "another store", "another seed"])
def test_a_cursor_refuses_what_has_changed_since(tmp_path, harm):
    store = make_store(tmp_path, random_events(300))
    cursor, path = make(store, columns=["item"]).cursor(0, 2), Path(store.files[1].path)
    content = bytearray(path.read_bytes())
    want, seed = f"{path}: ", 3
    if harm == "change":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "truncate":
        path.write_bytes(content[:-1])
    elif harm == "remove":
        path.unlink()
    elif harm == "another store":
        store, want = make_store(tmp_path / "other", random_events(300, seed=9)), "the cursor was taken on the manifest"
    else:
        seed, want = 4, "does not fit seed 4"
    with pytest.raises(DataError, match=want):
        list(make(store, columns=["item"], seed=seed).resume(cursor))


def test_streaming_equals_cached(store, monkeypatch):
    cached = [h.columns["item"].tolist() for h in make(store).epoch(1)]
    monkeypatch.setattr(decode_module, "CACHE_BYTES", 0)
    reader = make(store)
    assert reader.decoder._cache is None
    assert [h.columns["item"].tolist() for h in reader.epoch(1)] == cached


@pytest.mark.parametrize("batch_size", [1, 4, 1000])
def test_file_histories_are_in_store_order(store, batch_size):
    want, rows = histories_by_row(store), []
    reader = make(store, world_size=2, rank=1)
    for number, file in enumerate(store.files):
        sizes = []
        for h in reader.file_histories(number, batch_size):
            sizes.append(len(h.rows))
            rows += h.rows.tolist()
            assert h.num_global_rows == len(h.rows)
            for i, row in enumerate(h.rows):
                assert h.columns["item"][h.offsets[i] : h.offsets[i + 1]].tolist() == want[row][1]
        assert sizes[:-1] == [batch_size] * (len(sizes) - 1) and sum(sizes) == file.num_users
    assert rows == list(range(store.num_users))
    users = list(stored_histories(store, []))
    assert store.user_ids(np.array(rows)).to_pylist() == users


def test_refusals(store, tmp_path):
    with pytest.raises(DataError, match="no event column 'mood'; the store has: item, action"):
        make(store, columns=["item", "mood"])
    with pytest.raises(DataError, match=r"global_batch_size 2 is less than the world size.*at least 3"):
        make(store, global_batch_size=2, world_size=3)
    with pytest.raises(DataError, match=r"rank 2 is outside 0\.\.1"):
        make(store, rank=2, world_size=2)
    small = make_store(tmp_path, [{"user": u, "item": 1, "timestamp": 1} for u in range(3)])
    with pytest.raises(DataError, match="store has 3 users, world size 4: start at most 3 ranks"):
        make(small, columns=["item"], world_size=4)


def test_item_is_always_read(store):
    (h,) = make(store, columns=["action"], global_batch_size=10_000).epoch(0)
    assert list(h.columns) == ["item", "action"]


@pytest.mark.parametrize(
    ("unit", "times", "want"), [("ms", [1999, 2000], [1, 2]), ("ns", [10**9 - 1, 10**18], [0, 10**9])]
)
def test_times_are_floored_to_seconds(tmp_path, unit, times, want):
    events = [{"user": 1, "item": 1, "timestamp": t} for t in times]
    store = make_store(tmp_path, events, timestamp_unit=unit)
    (h,) = make(store, columns=["item"]).epoch(0)
    assert h.times_s.tolist() == want


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 7)), max_size=12))
def test_span_indices(spans):
    starts, lengths = np.array([s for s, _ in spans], np.int64), np.array([n for _, n in spans], np.int64)
    assert span_indices(starts, lengths).tolist() == [s + i for s, n in spans for i in range(n)]
    assert offsets_of(lengths).tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def test_counter_hash_is_splitmix64_and_stays_so():
    """First outputs of splitmix64 seeded with 0 and 1234567 (values of the reference implementation in C)."""
    assert counter_hash(0).tolist() == [0xE220A8397B1DCDAF]
    assert counter_hash(1234567).tolist() == [6457827717110365317]
    keys = counter_hash(1, np.arange(50)[:, None], np.arange(40)[None, :])
    assert keys.shape == (50, 40) and len(np.unique(keys)) == 2000
    uniform = counter_uniform(7, -1, np.arange(20_000))
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(uniform[1:], uniform[:-1])[0, 1]) < 0.03
