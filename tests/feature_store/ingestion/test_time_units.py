"""Times in another unit than they are read in are noticed: in a log, in settings, in candidates of a ranking."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from feature_store_reference import write_events

from elastic_rec.feature_store.batches.splits import ImpressionSplit, SplitConfig
from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.checks import ChecksConfig
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.times import parse_time_s
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.tasks.ranking.candidate_times import read_times

T = 1_700_000_003  # 2023-11-14T22:13:23Z
DAY = 86_400
SPREAD = T + np.random.default_rng(0).integers(0, 100 * DAY, 40)


def ingested(folder: Path, times: object, **settings) -> dict:
    """Figures of an ingest of one user's events."""
    values = pa.array(times)
    table = {"user_id": [1] * len(values), "item_id": list(range(len(values))), "timestamp": values}
    pq.write_table(pa.table(table), folder / "e.parquet")
    checks = ChecksConfig(**settings.pop("checks", {}))
    return ingest(IngestConfig(input=[str(folder / "e.parquet")], out=str(folder / "s"), overwrite=True, threads=1,
                               checks=checks, **settings))  # fmt: skip


FLOAT32 = SPREAD.astype(np.float32)


@pytest.mark.parametrize(
    ("times", "unit", "match"),
    [
        (SPREAD, "ms", r"the newest, 170\d+, is 1970-01-20T\S+Z in ms. In s it is 202\d-.*: set timestamp_unit=s"),
        (SPREAD * 1000, "us", r"is 1970-01-20T\S+Z in us. In ms it is 202\d-.*: set timestamp_unit=ms"),
        (SPREAD, "ns", r"is 1970-01-01T00:00:01Z in ns. In s it is 202\d-.*: set timestamp_unit=s"),
        (pa.array(SPREAD, pa.timestamp("ns")), "ns", r"In s it is 202\d-.*: make the column again from numbers in s"),
        ([*SPREAD.tolist(), 0, 253_370_764_800_000], "ms", r"In s it is 202\d-.*: set timestamp_unit=s"),
        ([20231118, 20240102], "s", r"1970-08-23T\S+Z in s. All look like dates written as YYYYMMDD.*\(2024-01-02\)"),
        (FLOAT32, "s", r"All are numbers that a float32 holds, which knows times to 64 or 128 s"),
        (FLOAT32[:2], "s", r"All are numbers that a float32 holds"),
        (FLOAT32.astype(np.float64), "s", r"All are numbers that a float32 holds"),
        (FLOAT32.astype(np.int64), "s", r"All are numbers that a float32 holds"),
        (pa.array(FLOAT32.astype(np.int64) * 10**6).cast(pa.timestamp("us")), "us", r"All are numbers that a float32"),
        ((SPREAD - 20 * 365 * DAY).astype(np.float32).astype(np.int64), "s", r"All are numbers that a float32 holds"),
    ],
)  # fmt: skip
def test_all_times_of_a_file_in_another_unit(tmp_path, times, unit, match):
    checks = {"future_times": "drop"}  # a sentinel beside them hides nothing
    with pytest.raises(DataError, match=rf"e\.parquet: \d+ timestamps are read in timestamp_unit={unit}: .*{match}.*"
                                        r"checks\.wrong_clock=keep"):  # fmt: skip
        ingested(tmp_path, times, timestamp_unit=unit, checks=checks)
    assert [path.name for path in tmp_path.iterdir()] == ["e.parquet"]
    figures = ingested(tmp_path, times, timestamp_unit=unit, checks=checks | {"wrong_clock": "keep"})
    assert figures["checks"]["wrong_clock"] == figures["events"]


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        (SPREAD, "s"),
        (SPREAD * 1000, "ms"),
        (SPREAD // DAY * DAY, "s"),  # dates, all divisible by 128
        (SPREAD // (DAY // 2) * (DAY // 2) * 1000, "ms"),
        (SPREAD // 3600 * 3600, "s"),
        ([1_700_000_000 + n * DAY for n in range(20)], "s"),
        (np.arange(100) * 128, "s"),  # from the start of a recording
        (np.arange(20_231_001, 20_231_060), "s"),
        (SPREAD.astype(np.float64), "s"),
        ([1.0, 2.0, 3.0], "s"),
        (np.array([5, 7], np.float32), "s"),
    ],
)
def test_times_that_are_right_pass(tmp_path, times, unit):
    assert ingested(tmp_path, times, timestamp_unit=unit)["checks"]["wrong_clock"] == 0


@pytest.mark.parametrize(("factor", "name"), [(1000, "ms"), (10**6, "us"), (10**9, "ns")])
def test_finer_times_read_as_seconds_are_in_the_future(tmp_path, factor, name):
    with pytest.raises(
        DataError, match=rf"row 1: timestamp .* in the future for timestamp_unit=s; in {name} it is 202"
    ):
        ingested(tmp_path, SPREAD * factor)


def test_the_unit_of_an_append_is_checked_too(tmp_path):
    ingested(tmp_path, SPREAD * 1000, timestamp_unit="ms")
    day = write_events(tmp_path / "day.csv", [{"user_id": 1, "item_id": 2, "timestamp": T}])
    with pytest.raises(
        DataError, match=r"day\.csv: 1 timestamps are read in timestamp_unit=ms: .*set timestamp_unit=s"
    ):
        append(AppendConfig(input=[day], store=str(tmp_path / "s")))
    assert Store.open(tmp_path / "s").version == 0


WORDS = ["nan", "NaN", "None", "null", "", "<NA>"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("role", ["user_id", "item_id", "event_id"])
def test_words_for_a_missing_id(tmp_path, role, suffix):
    columns = {"user_id": ["u", "v", "w", "x"], "item_id": ["1", "2", "3", "4"], "event_id": ["a", "b", "c", "d"]}
    columns[role][1:3] = "nan", "None"
    table = pa.table({**columns, "timestamp": [T] * 4})
    source = tmp_path / f"e.{suffix}"
    (pq.write_table if suffix == "parquet" else pa_csv.write_csv)(table, source)
    name = role if role == "event_id" else role.removesuffix("_id")
    match = (
        rf"e\.{suffix}: row 2: {name} 'nan' is what writers put for a missing id.*null_words=keep.*"
        r"\(1 more such rows in this file; checks\.null_words=drop"
    )
    common = {"input": [str(source)], "out": str(tmp_path / "s"), "event_id_column": "event_id", "overwrite": True}
    with pytest.raises(DataError, match=match):
        ingest(IngestConfig(**common))
    dropped = ingest(IngestConfig(**common, checks=ChecksConfig(null_words="drop")))
    assert (dropped["events"], dropped["checks"]["null_words"]) == (2, 2)
    kept = ingest(IngestConfig(**common, checks=ChecksConfig(null_words="keep")))
    assert (kept["events"], kept["checks"]["null_words"]) == (4, 2)


def test_every_word_counts_and_an_empty_text_is_null(tmp_path):
    table = pa.table({"user_id": WORDS * 2, "item_id": list("abcdef" * 2), "timestamp": [T] * 12})
    pq.write_table(table, tmp_path / "e.parquet")
    checks = ChecksConfig(null_words="keep", null_ids="drop")
    figures = ingest(IngestConfig(input=[str(tmp_path / "e.parquet")], out=str(tmp_path / "s"), checks=checks))
    assert (figures["checks"]["null_words"], figures["checks"]["null_ids"], figures["users"]) == (10, 2, 5)


def test_words_in_impressions(tmp_path):
    """Refused, unless they are ids of the store."""
    events = pa.table({"user_id": ["u", "null"], "item_id": ["a", "NaN"], "timestamp": [T, T]})
    pq.write_table(events, tmp_path / "e.parquet")
    keep = ChecksConfig(null_words="keep")
    ingest(IngestConfig(input=[str(tmp_path / "e.parquet")], out=str(tmp_path / "s"), checks=keep))

    def show(users: list[str], items: list[list[str]]) -> dict:
        clicks = [[1] * len(row) for row in items]
        table = {"user_id": users, "item_id": items, "click": clicks, "timestamp": [T] * len(users)}
        pq.write_table(pa.table(table), tmp_path / "i.parquet")
        config = ImpressionConfig(input=[str(tmp_path / "i.parquet")], label_columns=["click"])
        return ingest_impressions(config, out=str(tmp_path / "s"))

    assert show(["u", "null"], [["a", "NaN"], ["b"]])["impressions"] == 2
    with pytest.raises(DataError, match=r"i\.parquet: impression in row 2: user 'nan' is what .* 2 times in this file"):
        show(["u", "nan", "nan"], [["a"], ["a"], ["a"]])
    with pytest.raises(
        DataError, match=r"impression in row 2: item 'None' is what writers put .* no item of the store"
    ):
        show(["u", "u"], [["a"], ["NaN", "None"]])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            "20231118",
            r"this one is 1970-08-23T03:45:18Z. It looks like a date written as YYYYMMDD: write 2023-11-18 \(",
        ),
        ("202311", r"is 1970-01-03T\S+. It looks like a date written as YYYYMM: write 2023-11-01"),
        (
            "2023",
            r"is 1970-01-01T00:33:43Z. It looks like a date written as YYYY: write 2023-01-01 \(1970-01-01T00:33:43Z",
        ),
        (
            "20231118120000",
            r"after the year 2200. It looks like a date written as YYYYMMDDhhmmss: write 2023-11-18T12:00",
        ),
        (
            "1700265600000",
            r"after the year 2200. It looks like a time in ms: write 2023-11-18T00:00:00Z, or 1700265600$",
        ),
        ("1700265600000000", r"It looks like a time in us: write 2023-11-18T00:00:00Z, or 1700265600$"),
        ("1700265600000000000", r"It looks like a time in ns: write 2023-11-18T00:00:00Z"),
        ("9000000000", r"after the year 2200; give an ISO date"),
        ("9999-12-31", r"after the year 2200; give an earlier one"),
        ("3000-01-01T00:00:00Z", r"after the year 2200"),
    ],
)
def test_settings_that_are_no_seconds(text, match):
    """Refused when the configuration is read, wherever a moment is given, by the name of the key."""
    with pytest.raises(ValueError, match=rf"valid_time '{text}': .*{match}"):
        SplitConfig(kind="global_time", valid_time=text, test_time="2024-01-01")
    with pytest.raises(ValueError, match=rf"test_time '{text}': "):
        SplitConfig(kind="global_time", valid_time="2020-01-01", test_time=text)
    with pytest.raises(ValueError, match=rf"valid_time '{text}': .*{match}"):
        ImpressionSplit(valid_time=text)
    for settings in ({"first_time": text}, {"end_time": text}):
        with pytest.raises(ValueError, match=rf"{next(iter(settings))} '{text}': .*{match}"):
            IngestConfig(**settings)
    with pytest.raises(ValueError, match=rf"checks\.future_after '{text}': .*{match}"):
        ChecksConfig(future_after=text)


def test_settings_that_are_moments():
    assert parse_time_s("1970-08-23T03:45:18Z") == 20231118  # the way out of what looks like a date
    assert parse_time_s("2023-11-18") == parse_time_s("1700265600") == parse_time_s("2023-11-18T05:30:00+05:30")
    assert parse_time_s("2199-12-31") < parse_time_s("2200-01-01") == 7_258_118_400


def candidates(store: Store, column: pa.Array, unit: str = "s") -> list[int]:
    chunked = pa.chunked_array([column])
    return read_times(chunked, unit=unit, store=store, where="candidates: c.parquet", first_row=11).tolist()


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Store]:
    """Stores of the same events in s, ms and ns, and one whose events are of 1970."""
    made = {}
    for unit, factor in (("s", 1), ("ms", 1000), ("ns", 10**9), ("1970", 0)):
        folder = tmp_path_factory.mktemp("store")
        times = SPREAD * factor if factor else np.arange(40)
        ingested(folder, times, timestamp_unit=unit if factor else "s")
        made[unit] = Store.open(folder / "s")
    return made


def test_candidates_in_every_unit(stores):
    """In the store's unit, rounded down, so that what they see is what an impression of that time sees."""
    at = T * 1000 + 999
    want = {"s": T, "ms": at, "ns": at * 10**6}
    for name, time in want.items():
        store = stores[name]
        assert candidates(store, pa.array([at]), "ms") == [time]
        assert candidates(store, pa.array([float(at)]), "ms") == [time]
        for type in (pa.timestamp("ms"), pa.timestamp("ms", "Asia/Kolkata")):
            assert candidates(store, pa.array([at]).cast(type)) == [time]
    assert candidates(stores["ms"], pa.array([T])) == [T * 1000]
    assert candidates(stores["ms"], pa.array([dt.date(2023, 11, 18)])) == [1_700_265_600_000]
    assert candidates(stores["1970"], pa.array([5, 20_231_118])) == [5, 20_231_118]


@pytest.mark.parametrize(
    ("column", "unit", "match"),
    [
        (pa.array([T, T * 1000]), "s", r"row 12: timestamp 55840-\S+ \(1700000003000 in timestamp_unit=s\) cannot "
         r"belong to the events of .*nor can 0 more in this part; in ms it is 2023-11-14T22:13:23Z: set timestamp"),
        (pa.array([T, T]), "ms", r"row 11: timestamp 1970-01-20\S+ .* nor can 1 more.*set timestamp_unit=s"),
        (pa.array([20231118]), "s", r"row 11: timestamp 1970-08-23\S+ .*YYYYMMDD: write it as an ISO time or date"),
        (pa.array([dt.datetime(9999, 12, 31)], pa.timestamp("us")), "s", r"row 11: timestamp 9999-12-31.*repair"),
        (pa.array([dt.date(1, 1, 1)]), "s", r"row 11: timestamp 0001-01-01T00:00:00Z cannot belong"),
        (pa.array([2**63 - 1], pa.timestamp("us")), "s", r"row 11: timestamp 294247-\S+ cannot belong"),
        (pa.array([T, None]), "s", r"row 12: no timestamp, and 0 more such rows; fill them in"),
        (pa.array([T + 0.5]), "s", r"row 11: timestamp 1700000003\.5 is no whole number of timestamp_unit"),
        (pa.array([float("nan")]), "s", r"row 11: timestamp nan is no whole number"),
        (pa.array([2**63], pa.uint64()), "s", r"row 11: timestamp 9223372036854775808 .* does not fit int64"),
        (pa.array([float(T)], pa.float32()), "s", r"timestamp is float: .* \(float32 knows times to 64 or 128 s"),
        (pa.array(["2024-01-01"]), "s", r"timestamp is string: give timestamps, or whole numbers of timestamp_unit"),
    ],
)  # fmt: skip
def test_candidates_that_cannot_belong_to_the_store(stores, column, unit, match):
    for name in ("s", "ms", "ns"):
        with pytest.raises(ConfigError, match=rf"candidates: c\.parquet(, |: ){match}"):
            candidates(stores[name], column, unit)
