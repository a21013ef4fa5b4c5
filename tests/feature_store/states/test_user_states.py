"""User states beside the store: every event is folded in once, in order, whatever days, crashes and restores bring.

The states here are 24 bytes of a test's own: how many events, a hash that depends on their order, a sum that does not.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from feature_store_reference import make_store, random_events, write_events
from states import expected, fold_store, folder_of, states_of
from stores import add, back, clean, eleven_days

from elastic_rec.feature_store.states.increments import Increments, LateEvents
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError


@pytest.mark.parametrize(("event_ids", "strings"), [(False, False), (True, True), (True, False)])
def test_every_event_once_and_in_order_over_many_days(tmp_path, strings, event_ids):
    """Late events, ties at the watermark, new users and new items; thin days that leave buckets alone."""
    days = eleven_days(strings=strings)[:8]
    settings = {"context_columns": ["action"], "event_id_column": "event_id" if event_ids else None}
    store = make_store(tmp_path, days[0], num_buckets=5, **settings)
    late = 0
    for number, day in enumerate(days):
        if number:
            add(store, write_events(tmp_path / f"{number}.parquet", day))
            store = Store.open(store.path)
        counts = fold_store(store)
        late += counts["late_events"]
        assert states_of(store) == expected(store)
    assert late > 20
    again = fold_store(store)
    assert again["folded_events"] == again["decoded_events"] == 0, "nothing is folded in twice"
    assert fold_store(store, rescore=True)["folded_events"] == 0 and states_of(store) == expected(store)


@pytest.mark.parametrize("event_ids", [False, True])
def test_late_events_folded_where_they_came(tmp_path, event_ids):
    days = eleven_days(strings=False)[:6]
    settings = {"context_columns": ["action"], "event_id_column": "event_id" if event_ids else None}
    store = make_store(tmp_path, days[0], num_buckets=2, **settings)
    late = differing = 0
    for number, day in enumerate(days):
        if number:
            add(store, write_events(tmp_path / f"{number}.parquet", day))
            store = Store.open(store.path)
        counts = fold_store(store, "fold")
        late += counts["late_events"]
        assert counts["reencoded_users"] == 0
        got, want = states_of(store), expected(store)
        assert {u: (s[0], s[2]) for u, s in got.items()} == {u: (s[0], s[2]) for u, s in want.items()}
        differing += got != want
    assert late > 20 and differing, "the same events in another order"


def test_folded_late_events_take_the_clocks_time_and_their_place_behind_it(tmp_path):
    event = {"action": "view", "rating": 1, "event_id": 0, "user": 1}
    times = [(10, 1), (20, 2), (20, 3), (30, 4)]
    before = [{**event, "timestamp": 1_000_000 + t, "item": i} for t, i in times]
    store = make_store(tmp_path, before, context_columns=["action"], num_buckets=1)
    fold_store(store)
    now = [{**event, "timestamp": 1_000_000 + t, "item": i} for t, i in [(20, 5), (5, 6), (30, 7), (40, 8)]]
    add(store, write_events(tmp_path / "day.parquet", now))
    store = Store.open(store.path)
    old = folder_of(store).open(store.files[0])
    common = {"columns": ["item"], "states": old, "rescore": False, "batch_size": 4}
    (span,) = Increments(store, store.files[0], late_events=LateEvents.fold, **common)
    items = store.vocabulary("item").decode(span.histories.columns["item"]).to_pylist()
    assert items == [1, 2, 3, 4, 6, 5, 7, 8] and span.first_U.tolist() == [4]
    assert (span.histories.times_s - 1_000_000).tolist() == [10, 20, 20, 30, 30, 30, 30, 40]
    (span,) = Increments(store, store.files[0], late_events=LateEvents.reencode, **common)
    items = store.vocabulary("item").decode(span.histories.columns["item"]).to_pylist()
    assert items == [6, 1, 2, 3, 5, 4, 7, 8] and span.first_U.tolist() == [0] and span.state_row_U.tolist() == [-1]
    clean(store)
    increments = Increments(store, store.files[0], late_events=LateEvents.fold, **common)
    assert next(iter(increments)).first_U.tolist() == [0] and increments.counts["reencoded_users"] == 1


def test_only_row_groups_with_new_events_are_decoded(tmp_path):
    events = random_events(1500)
    store = make_store(tmp_path, events, context_columns=["action"], num_buckets=2, row_group_events=100)
    fold_store(store)
    user = events[0]["user"]
    newer = [{**events[0], "timestamp": 2_000_000}]
    add(store, write_events(tmp_path / "day.parquet", newer))
    counts = fold_store(store := Store.open(store.path))
    assert counts["folded_events"] == counts["users_with_new_events"] == 1
    groups = [size for file in store.files for size in file.row_groups]
    assert len(groups) > 6 and counts["decoded_events"] in [events for _, events in groups]
    assert states_of(store)[user] == expected(store)[user]


def test_a_restore_is_noticed_and_encoded_again(tmp_path):
    days = eleven_days(strings=False)
    store = make_store(tmp_path, days[0], num_buckets=2, context_columns=["action"])
    for number in (1, 2):
        add(store, write_events(tmp_path / f"{number}.parquet", days[number]))
        fold_store(store := Store.open(store.path))
    back(store, 1)
    store = Store.open(store.path)
    assert all(folder_of(store).open(file) is None for file in store.files), "too far ahead"
    add(store, write_events(tmp_path / "3.parquet", days[3]))
    store = Store.open(store.path)
    assert fold_store(store)["new_users"] == store.num_users, "another day 2: as many inputs, not the same"
    assert states_of(store) == expected(store)


def test_refusals(tmp_path):
    store = make_store(tmp_path, random_events(300), context_columns=["action"], num_buckets=1)
    fold_store(store)
    folder, (file,) = folder_of(store), store.files
    other = folder_of(store, "b" * 32)
    assert other.open(file) is None
    shutil.copytree(folder.path, other.path)
    with pytest.raises(DataError, match=r"states of another model \(fingerprint a{16}, this model's is b{16}\)"):
        other.open(file)
    with folder.writing(), pytest.raises(DataError, match="another job is folding"), folder.writing():
        pass
    whole = Path(folder.file_path(file)).read_bytes()
    column = pq.ParquetFile(Path(folder.file_path(file))).metadata.row_group(0).column(4)
    where = column.data_page_offset + column.total_compressed_size - 8
    Path(folder.file_path(file)).write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
    with pytest.raises(DataError, match="cannot be decoded"):
        states_of(store)
    Path(folder.file_path(file)).write_bytes(whole[:-100])
    with pytest.raises(DataError, match="cannot be opened"):
        folder.open(file)
    Path(folder.file_path(file)).write_bytes(whole)
    assert states_of(store) == expected(store) and UNITS_PER_SECOND[store.time_unit] == 1


def test_an_unfinished_write_changes_nothing(tmp_path):
    store = make_store(tmp_path, random_events(300), context_columns=["action"], num_buckets=1)
    fold_store(store)
    before = Path(folder_of(store).file_path(store.files[0])).read_bytes()
    add(store, write_events(tmp_path / "day.parquet", random_events(50, seed=1)))
    store = Store.open(store.path)
    folder, (file,) = folder_of(store), store.files
    writer = folder.writer(file)  # and the process dies before commit
    assert Path(folder.file_path(file)).read_bytes() == before
    del writer
    fold_store(store)
    assert states_of(store) == expected(store)
