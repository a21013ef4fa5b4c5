"""Daily appends: value for value one ingest of everything; ids that stay; what is refused; versions of one store."""

import json
import os
import shutil
import time
from collections import Counter

import pytest
from feature_store_reference import (
    make_store,
    pick,
    random_events,
    reference_histories,
    stored_histories,
    write_events,
)
from stores import add, back, clean, eleven_days

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.table.manifest import content_hash
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.versions import writing
from elastic_rec.feature_store.utils.errors import DataError

CONTEXT = ["action", "rating"]
NAMES = ["timestamp", "item", *CONTEXT]


def histories(store, names=NAMES) -> dict:
    return pick(stored_histories(store, [n for n in names if n in store.columns]), names)


@pytest.mark.parametrize(("strings", "event_id"), [(False, None), (True, "event_id")])
def test_ten_appends_and_a_vacuum_equal_one_ingest(tmp_path, strings, event_id):
    days = eleven_days(strings=strings)
    everything = [e for day in days for e in day]
    if event_id:  # events sent again, in the same file and days later
        days[2] += days[2][:20]
        days[7] += days[1][:30] + days[6][5:15]
        sent = [e for day in days for e in day]
    else:
        sent = everything
    store = make_store(tmp_path, days[0], context_columns=CONTEXT, event_id_column=event_id)
    duplicates, suffixes = 0, ("csv", "parquet", "tsv")
    for number, day in enumerate(days[1:], 1):
        figures = add(
            store, write_events(tmp_path / f"day{number}.{suffixes[number % 3] if not strings else 'parquet'}", day)
        )
        duplicates += figures["dropped_duplicates"]
        assert (figures["version"], figures["events"]) == (number, Store.open(store.path).num_events)
    assert duplicates == (60 if event_id else 0)
    whole = make_store(tmp_path / "whole", sent, context_columns=CONTEXT, event_id_column=event_id)
    before = Store.open(store.path).manifest.hash
    figures = clean(store)
    grown = Store.open(store.path)
    assert figures["kept_versions"] == [10] and grown.manifest.hash == before
    grown.verify()
    want = reference_histories(everything, event_id=event_id is not None)
    assert histories(grown) == histories(whole) == pick(want, NAMES)
    # Row groups, users, times: all that does not depend on item indices is the same file by file.
    keys = ("num_users", "num_events", "row_groups", "min_time", "max_time")
    assert [[getattr(f, k) for k in keys] for f in grown.manifest.files] == [
        [getattr(f, k) for k in keys] for f in whole.manifest.files
    ]
    assert grown.manifest.filters == whole.manifest.filters
    for column in ("user", "item", *CONTEXT):
        a, b = grown.vocabulary(column), whole.vocabulary(column)
        assert dict(zip(a.ids.to_pylist(), a.counts[2:], strict=True)) == dict(
            zip(b.ids.to_pylist(), b.counts[2:], strict=True)
        )
    on_disk = {file.below(store.path) for file in store.path.files()}
    named = {e.path for e in grown.manifest.named_files()}
    assert on_disk == named | {"manifest.json", "manifest-000010.json"}


def test_old_ids_stay_and_new_ones_follow_by_count_then_id(tmp_path):
    def event(item, t):
        return {"user": 1, "item": item, "timestamp": t, "action": None if item == 5 else "view"}

    store = make_store(tmp_path, [event(i, 9) for i in (30, 20, 20)], context_columns=["action"])
    day = [event(i, t) for t, i in enumerate([5, 40, 7, 40, 30, 30, 5, 3])]
    figures = add(store, write_events(tmp_path / "d.parquet", day))
    grown = Store.open(store.path)
    vocabulary = grown.vocabulary("item")
    assert vocabulary.ids.to_pylist() == [20, 30, 5, 40, 3, 7]
    assert vocabulary.counts.tolist() == [0, 0, 2, 3, 2, 2, 1, 1]
    assert (figures["new_items"], figures["new_users"], figures["items"]) == (4, 0, 6)
    assert grown.vocabulary("action").counts.tolist() == [0, 0, 9]
    # Item 30 is now the more frequent one; its index must not tell.
    assert store.vocabulary("item").ids.to_pylist() == [20, 30]


def test_untouched_buckets_are_shared_and_the_cost_is_told(tmp_path):
    store = make_store(tmp_path, random_events(900), num_buckets=8)
    day = [{"user": u, "item": 2, "timestamp": 1_000_010} for u in (-8, 3, 3 + 8 * 50)]  # buckets 0 and 3
    figures = add(store, write_events(tmp_path / "d.csv", day))
    grown = Store.open(store.path)
    paths = [[f.path.name for f in s.files] for s in (store, grown)]
    assert [i for i, (a, b) in enumerate(zip(*paths, strict=True)) if a != b] == [0, 3]
    rewritten = [grown.manifest.files[i] for i in (0, 3)]
    assert figures["rewritten_files"] == 2
    share = 3 / sum(f.num_events for f in rewritten)
    assert figures["appended_bytes"] == round(share * sum(f.bytes for f in rewritten))
    assert figures["write_amplification"] == pytest.approx(figures["written_bytes"] / figures["appended_bytes"], 0.01)


def test_a_bucket_that_was_empty(tmp_path):
    store = make_store(tmp_path, [{"user": 4, "item": 1, "timestamp": 5}], num_buckets=4)
    day = [{"user": u, "item": 1, "timestamp": 5} for u in (3, 1)]
    add(store, write_events(tmp_path / "d.csv", day))
    assert [f.path.parent.name for f in Store.open(store.path).files] == ["bucket=0000", "bucket=0001", "bucket=0003"]
    assert list(histories(Store.open(store.path), ["item"])) == [4, 1, 3]


def test_the_same_file_again_is_refused_unless_forced(tmp_path):
    events = random_events(300)
    store = make_store(tmp_path, events[:200])
    day = write_events(tmp_path / "d.csv", events[200:])
    add(store, day)
    renamed = shutil.copy(day, tmp_path / "renamed.csv")
    for source, where in (
        (renamed, "d.csv, version 1"),
        (tmp_path / "events.parquet", "events.parquet, version 0"),
    ):
        with pytest.raises(DataError, match=rf"the same bytes were taken before \(.*{where}\).*force=true"):
            add(store, source)
    other = write_events(tmp_path / "e.csv", events[:5])
    twice = AppendConfig(input=[other, shutil.copy(other, tmp_path / "f.csv")], store=str(store.path))
    with pytest.raises(DataError, match=r"f\.csv: the same bytes as .*e\.csv; each row"):
        append(twice)
    assert Store.open(store.path).version == 1
    assert add(store, renamed, force=True)["events"] == 400
    assert histories(Store.open(store.path), NAMES[:2]) == pick(reference_histories(events + events[200:]), NAMES[:2])


def test_the_same_events_again_are_no_new_version(tmp_path):
    events = random_events(300)
    store = make_store(tmp_path, events[:200], event_id_column="event_id")
    day = write_events(tmp_path / "d.csv", events[200:])
    add(store, day)
    now = Store.open(store.path).manifest
    figures = add(store, day)
    assert (figures["dropped_duplicates"], figures["appended_events"], figures["events"]) == (100, 0, 300)
    assert figures["version"] == 1 and Store.open(store.path).manifest == now


def test_appends_that_cannot_be_exact_are_refused(tmp_path):
    events = random_events(300)
    day = write_events(tmp_path / "d.csv", events[200:])
    words = write_events(tmp_path / "w.csv", [{**events[0], "item": "hat"}])
    filtered = make_store(tmp_path / "a", events[:200], min_item_events=2)
    with pytest.raises(DataError, match=r"was made with min_item_events=2: .* ingest everything again"):
        add(filtered, day)
    store = make_store(tmp_path / "b", events[:200])
    for settings in (
        {"num_buckets": 8},
        {"context_columns": ["action"]},
        {"timestamp_unit": "ms"},
        {"overwrite": True},
    ):
        with pytest.raises(TypeError, match=next(iter(settings))):  # what the store was made with cannot be given
            add(store, day, **settings)
    with pytest.raises(DataError, match=r"input has item 'hat', but .* holds integers there"):
        add(store, words)
    texts = make_store(tmp_path / "c", random_events(50, strings=True))
    with pytest.raises(DataError, match=r"input has int64 in user, .* has strings"):
        add(texts, write_events(tmp_path / "d.parquet", events[200:]))
    for folder in ("a", "b", "c"):
        assert sorted(p.name for p in (tmp_path / folder / "store").glob("manifest*")) == ["manifest.json"]
        assert not (tmp_path / folder / "store" / ".append").exists()
    with pytest.raises(DataError, match="no such folder; make the store first"):
        append(AppendConfig(input=[day], store=str(tmp_path / "none")))


def test_a_flipped_bit_is_not_copied_into_a_new_version(tmp_path):
    events = random_events(300)
    store = make_store(tmp_path, events[:200])
    path = store.files[0].path
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.replace(bytes(content))
    with pytest.raises(DataError, match=rf"{path}: its sha256 is not the manifest's; the file was changed or damaged"):
        add(store, write_events(tmp_path / "d.csv", events[200:]))


def test_readers_of_old_versions_go_on_until_a_vacuum_after_the_retention(tmp_path):
    events = random_events(600)
    store = make_store(tmp_path, events[:200])

    def epoch(store):
        reader = HistoryReader(store, columns=[], global_batch_size=7, shuffle=True)
        return [(b.rows.tolist(), b.columns["item"].tolist(), b.times_s.tolist()) for b in reader.epoch(0)]

    first, wanted = store, epoch(store)
    half_way = HistoryReader(first, columns=[], global_batch_size=7, shuffle=True).epoch(0)
    read = [next(half_way)]
    for number in (1, 2):
        add(store, write_events(tmp_path / f"{number}.csv", events[200 * number : 200 * number + 200]))
    assert clean(store, retention_hours=1)["dropped_versions"] == []  # all three were current a moment ago
    assert epoch(first) == epoch(Store.open(store.path, version=0)) == wanted
    read += list(half_way)
    assert [b.rows.tolist() for b in read] == [rows for rows, *_ in wanted]
    assert Store.open(store.path, version=1).num_events == 400
    long_ago = time.time() - 7200
    os.utime(store.path / "manifest-000000.json", (long_ago, long_ago))
    figures = clean(store, retention_hours=1)
    assert figures["dropped_versions"] == [0] and figures["freed_bytes"] > 0
    assert Store.open(store.path, version=1).num_events == 400  # younger versions keep their files
    with pytest.raises(DataError, match=r"no version 0; there are 1, 2"):
        Store.open(store.path, version=0)
    with pytest.raises(DataError, match=r"cannot be opened .*open the store again"):
        epoch(first)
    Store.open(store.path).verify()


def test_restore_and_on_from_there(tmp_path):
    events = random_events(800)
    store = make_store(tmp_path, events[:200])
    days = [write_events(tmp_path / f"{n}.csv", events[200 * n : 200 * n + 200]) for n in (1, 2, 3)]
    hashes = [store.manifest.hash] + [add(store, day)["hash"] for day in days[:2]]
    figures = back(store, 1)
    assert (figures["was"], figures["version"], figures["hash"]) == (2, 1, hashes[1])
    assert Store.open(store.path).manifest.hash == hashes[1]
    back(store, 0)
    assert histories(Store.open(store.path), NAMES[:2]) == pick(reference_histories(events[:200]), NAMES[:2])
    back(store, 1)
    assert add(store, days[2])["version"] == 3  # numbers are not used twice
    assert add(store, days[1])["version"] == 4  # what was restored over may be appended again
    order = events[:400] + events[600:] + events[400:600]
    assert histories(Store.open(store.path), NAMES[:2]) == pick(reference_histories(order), NAMES[:2])
    with pytest.raises(DataError, match=r"no version 9; there are 0, 1, 2, 3, 4"):
        back(store, 9)
    assert clean(store)["dropped_versions"] == [0, 1, 2, 3]
    Store.open(store.path).verify()


def test_a_pointer_to_a_missing_version_is_refused_and_restore_mends_it(tmp_path):
    events = random_events(600)
    store = make_store(tmp_path, events[:200])
    for n in (1, 2):
        add(store, write_events(tmp_path / f"{n}.csv", events[200 * n : 200 * n + 200]))
    (store.path / "manifest-000002.json").delete()
    match = (
        r"names version 2, but manifest-000002\.json is missing; .*take one of 0, 1, with .*ingest.py restore version=N"
    )
    with pytest.raises(DataError, match=match):
        Store.open(store.path)
    with pytest.raises(DataError, match=match):
        clean(store)
    (store.path / "manifest.json").delete()
    with pytest.raises(DataError, match=r"it has no manifest\.json\); take one of 0, 1"):
        Store.open(store.path)
    back(store, 1)
    assert Store.open(store.path).num_events == 400


def test_one_writer_at_a_time(tmp_path):
    events = random_events(300)
    store = make_store(tmp_path, events[:200])
    day = write_events(tmp_path / "d.csv", events[200:])
    at_work = "another append, vacuum or restore is at work"
    with writing(str(store.path)):
        for write in (lambda: add(store, day), lambda: clean(store), lambda: back(store, 0)):
            with pytest.raises(DataError, match=at_work):
                write()
        with pytest.raises(DataError, match="an append or vacuum is at work in it"):
            make_store(tmp_path, events, overwrite=True)
        assert Store.open(store.path).num_events == 200  # readers take no lock
    assert add(store, day)["events"] == 300


def test_stores_from_before_appends_still_open_but_do_not_grow(tmp_path):
    store = make_store(tmp_path, random_events(100))
    path = store.path / "manifest.json"
    old = json.loads(path.read_bytes())
    del old["generation"], old["row_group_events"]
    path.replace(json.dumps({**old, "hash": content_hash(old)}).encode())
    assert Store.open(store.path).version == Store.open(store.path, version=0).version == 0
    with pytest.raises(DataError, match="written before appends"):
        add(store, write_events(tmp_path / "d.csv", random_events(5)))


def test_create_drops_duplicates_by_event_id_and_counts_them(tmp_path):
    events = random_events(300)
    again = [{**e, "item": 99} for e in events[10:40]]  # of equals the first one stays, whatever the rest says
    store = make_store(tmp_path, events + again, event_id_column="event_id", context_columns=["action"])
    assert histories(store, NAMES[:3]) == pick(reference_histories(events, event_id=True), NAMES[:3])
    assert store.manifest.filters["dropped_duplicates"] == 30
    counts = Counter(e["item"] for e in events)
    vocabulary = store.vocabulary("item")
    assert dict(zip(vocabulary.ids.to_pylist(), vocabulary.counts[2:], strict=True)) == counts


def test_appends_do_not_depend_on_threads_or_memory(tmp_path):
    events = random_events(4000, num_users=300)
    hashes = set()
    for threads, memory in ((1, "1GB"), (4, "64MB")):
        store = make_store(tmp_path, events[:3000], overwrite=True)
        day = write_events(tmp_path / "d.parquet", events[3000:])
        config = AppendConfig(input=[day], store=str(store.path), threads=threads, memory_limit=memory)
        hashes.add(append(config)["hash"])
    assert len(hashes) == 1
