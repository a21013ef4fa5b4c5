"""Every check counts what a plain loop counts, its policy does what it says; filters keep what they should."""

from collections import Counter

import numpy as np
import pytest
from feature_store_reference import make_store, pick, random_events, reference_histories, stored_histories, write_events

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.checks import BEFORE_ALL_INPUT, ChecksConfig, late_events
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.vocabulary import UNKNOWN
from elastic_rec.feature_store.utils.errors import DataError

NAMES = ["timestamp", "item"]
DAY = 86400
# u1: late at 5; u2: a gap of 4000 days; a null user, a null item, two bad times, one in the future, one row twice
ROWS = [
    "u1,10,7,1", "u1,11,9,2", "u1,12,5,3", "u2,10,100,4", f"u2,13,{100 + 4000 * DAY},5", ",10,8,6", "u3,,8,7",
    "u3,10,never,8", "u3,10,-4,9", "u3,11,99999999999,10", "u1,11,9,2", "u3,14,50,11",
]  # fmt: skip
KEPT = {"u1": [(5, 12), (7, 10), (9, 11)], "u2": [(100, 10), (100 + 4000 * DAY, 13)], "u3": [(50, 14)]}
DROP_ALL = {"null_ids": "drop", "bad_times": "drop", "future_times": "drop"}
COUNTS = {
    "null_ids": 2, "null_words": 0, "bad_times": 2, "future_times": 1, "wrong_clock": 0, "duplicates": 1,
    "out_of_order": 1, "gaps": 1,
}  # fmt: skip


def run(tmp_path, rows=None, **checks) -> tuple[dict, dict]:
    """(figures, user -> [(time, item)])"""
    source = tmp_path / "e.csv"
    source.write_text("\n".join(["user_id,item_id,timestamp,e", *(ROWS if rows is None else rows)]) + "\n")
    config = IngestConfig(
        input=[str(source)],
        out=str(tmp_path / "s"),
        event_id_column="e",
        overwrite=True,
        threads=1,
        checks=ChecksConfig(**checks),
    )
    figures = ingest(config)
    return figures, pick(stored_histories(Store.open(tmp_path / "s"), ["item"]), NAMES)


def test_counts_and_drops(tmp_path):
    figures, histories = run(tmp_path, **DROP_ALL)
    assert figures["checks"] == COUNTS
    assert histories == KEPT
    assert (figures["read_events"], figures["events"], figures["dropped_duplicates"]) == (12, 6, 1)
    assert figures["written_bytes"] > 0 and figures["peak_memory_bytes"] > 1 << 20 and figures["events_per_s"] > 0


def test_each_policy_changes_its_own_events_only(tmp_path):
    future = {"u3": [(50, 14), (99999999999, 11)]}
    figures, histories = run(tmp_path, **DROP_ALL | {"future_times": "keep"})
    # The event before it in the log is then a late one, and far from it.
    assert histories == KEPT | future and figures["checks"] == COUNTS | {"gaps": 2, "out_of_order": 2}
    figures, histories = run(tmp_path, **DROP_ALL, duplicates="keep")
    assert histories["u1"] == [(5, 12), (7, 10), (9, 11), (9, 11)] and figures["checks"] == COUNTS
    figures, histories = run(tmp_path, **DROP_ALL, out_of_order="drop")
    assert histories == KEPT | {"u1": [(7, 10), (9, 11)]} and figures["checks"] == COUNTS
    figures, histories = run(tmp_path, **DROP_ALL, gaps="drop")  # the newest stretch stays
    assert histories == KEPT | {"u2": [(100 + 4000 * DAY, 13)]} and figures["checks"] == COUNTS
    _, histories = run(tmp_path, **DROP_ALL, max_gap_days=5000, gaps="fail")
    assert histories == KEPT
    figures, histories = run(tmp_path, **DROP_ALL, future_after="1975-01-01")
    assert histories == KEPT | {"u2": [(100, 10)]} and figures["checks"]["future_times"] == 2


@pytest.mark.parametrize(
    ("check", "match"),
    [
        ("null_ids", r"e\.csv: row 6: user is empty \(null\).*\(1 more such rows.*checks\.null_ids=drop"),
        ("bad_times", r"e\.csv: row 8: timestamp 'never' is not a number.*\(1 more.*checks\.bad_times=drop"),
        ("future_times", r"row 10: timestamp '9+' is in the future for timestamp_unit=s.*checks\.future_times=keep"),
        ("duplicates", r"1 duplicate events \(same user, time and event id\), the first of user 'u1', time 9"),
        ("out_of_order", r"user 'u1', event at 5 \(s\): out_of_order.*checks\.out_of_order=keep"),
        ("gaps", r"user 'u2', event at 100 \(s\): gaps \(more than 3650\.0 days before the next"),
    ],
)
def test_fail_names_the_event_and_leaves_nothing(tmp_path, check, match):
    with pytest.raises(DataError, match=match):
        run(tmp_path, **DROP_ALL | {check: "fail"})
    assert [path.name for path in tmp_path.iterdir()] == ["e.csv"]


def test_policies_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="null_ids=keep: such events cannot be stored; set fail or drop"):
        ChecksConfig(null_ids="keep")
    with pytest.raises(ValueError, match=r"checks\.max_gap_days=0: set above 0"):
        ChecksConfig(max_gap_days=0)
    with pytest.raises(ValueError, match="first_time=20 is not before end_time=20"):
        IngestConfig(first_time="20", end_time="20")


def test_late_events_against_a_plain_loop():
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 30))
        users = np.sort(rng.integers(0, 4, n))
        place = rng.permutation(n)
        old = rng.random(n) < 0.2
        times = rng.integers(0, 6, n)
        order = np.lexsort((place, ~old, times, users))  # as the store sorts: old events first among equal times
        users, times, place, old = users[order], times[order], place[order], old[order]
        for user in range(4):  # old events stand in the order they are stored in
            mine = np.flatnonzero((users == user) & old)
            place[mine] = np.arange(len(mine)) + BEFORE_ALL_INPUT
        want = [
            any(users[j] == users[i] and times[j] > times[i] and place[j] < place[i] for j in range(n))
            for i in range(n)
        ]
        assert late_events(times, place, users).tolist() == want


def test_late_events_of_an_append_are_counted(tmp_path):
    events = sorted(random_events(400), key=lambda e: e["timestamp"])
    late = events[10:30]
    store = make_store(tmp_path, events[:10] + events[30:])
    newest = {e["user"]: e["timestamp"] for e in events[30:]}
    first = write_events(tmp_path / "late.parquet", late)
    figures = append(AppendConfig(input=[first], store=str(store.path), threads=1))
    assert figures["checks"]["out_of_order"] == sum(newest.get(e["user"], 0) > e["timestamp"] for e in late) > 5
    with pytest.raises(DataError, match=r"checks\.out_of_order=drop would look at the new events alone"):
        append(AppendConfig(input=[first], store=str(store.path), checks=ChecksConfig(out_of_order="drop")))


@pytest.mark.parametrize("event_id", [None, "event_id"])
def test_max_history_keeps_the_newest(tmp_path, event_id):
    events = random_events(900)
    store = make_store(tmp_path, events, max_history=7, event_id_column=event_id)
    whole = pick(reference_histories(events, event_id=event_id is not None), NAMES)
    assert pick(stored_histories(store, ["item"]), NAMES) == {user: h[-7:] for user, h in whole.items()}
    assert max(map(len, whole.values())) > 50
    assert store.vocabulary("item").counts.sum() == store.num_events  # counts of kept events
    with pytest.raises(DataError, match="was made with max_history=7"):
        append(AppendConfig(input=[write_events(tmp_path / "d.csv", events[:9])], store=str(store.path)))


def test_time_range_holds_for_appends_too(tmp_path):
    events = random_events(600)
    kept = [e for e in events if 1_000_005 <= e["timestamp"] < 1_000_020]
    assert 0 < len(kept) < len(events)
    store = make_store(tmp_path, events[:300], first_time="1000005", end_time="1970-01-12T13:47:00")
    append(AppendConfig(input=[write_events(tmp_path / "d.csv", events[300:])], store=str(store.path)))
    grown = Store.open(store.path)
    assert pick(stored_histories(grown, ["item"]), NAMES) == pick(reference_histories(kept), NAMES)
    assert grown.manifest.filters["dropped_events"] == len(events) - len(kept)


def test_rare_ids_share_unknown_and_their_events_stay(tmp_path):
    events = random_events(300, num_items=100)
    counts = Counter(e["item"] for e in events)
    store = make_store(tmp_path, events, min_vocabulary_count=4, context_columns=["action"])
    vocabulary = store.vocabulary("item")
    assert set(vocabulary.ids.to_pylist()) == {item for item, n in counts.items() if n >= 4} < set(counts)
    assert store.num_events == 300
    flat = [e["item"] for h in stored_histories(store, []).values() for e in h]
    assert flat.count(UNKNOWN) == sum(n for n in counts.values() if n < 4) > 0
    day = [{**events[0], "item": 777 + (n > 2), "timestamp": 2_000_000 + n} for n in range(7)]  # 3 of 777, 4 of 778
    append(AppendConfig(input=[write_events(tmp_path / "d.parquet", day)], store=str(store.path)))
    grown = Store.open(store.path).vocabulary("item")
    assert grown.ids.to_pylist() == [*vocabulary.ids.to_pylist(), 778]
