"""Columns of times: ISO texts, sentinel dates, infinity and the edges of int64 obey the policies and name the row."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_store_reference import stored_histories

from elastic_rec.feature_store.ingestion.checks import ChecksConfig
from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError

NOON = 1_704_110_400  # 2024-01-01T12:00:00Z
GOOD = [dt.datetime(2024, 1, day) for day in (1, 2, 3)]
DROP = {"bad_times": "drop", "future_times": "drop"}


def stored(folder: Path, times: pa.Array | list[str], **settings) -> tuple[list[int], dict]:
    """(times of the only user's events, as stored, figures) of an ingest of Parquet or, of a list of texts, CSV."""
    if isinstance(times, list):
        source = folder / "e.csv"
        lines = [f'1,{n},"{text}"' for n, text in enumerate(times)]
        source.write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    else:
        source = folder / "e.parquet"
        table = {"user_id": [1] * len(times), "item_id": list(range(len(times))), "timestamp": times}
        pq.write_table(pa.table(table), source)
    checks = ChecksConfig(**settings.pop("checks", {}))
    out = folder / "store"
    config = IngestConfig(input=[str(source)], out=str(out), overwrite=True, threads=1, checks=checks, **settings)
    figures = ingest(config)
    (events,) = stored_histories(Store.open(out), []).values()
    return [event["timestamp"] for event in events], figures


@pytest.mark.parametrize("as_parquet", [False, True])
def test_iso_texts_are_times(tmp_path, as_parquet):
    texts = ["2024-01-01T14:00:01+02:00", "2024-01-01T12:00:02Z", "2024-01-01 12:00:03", "2024-01-01 06:30:04-0530",
             "2024-01-01 12:00:05 UTC", "2024-01-01T12:00:06.000000000Z", "2024-01-01 14:00:07+02", str(NOON + 8),
             f"{NOON + 9}.0", "2024-01-02"]  # fmt: skip
    times = pa.array(texts).dictionary_encode() if as_parquet else texts
    want = [NOON + n for n in range(1, 10)] + [NOON + 43_200]
    assert stored(tmp_path, times)[0] == want


def test_iso_texts_keep_their_digits(tmp_path):
    texts = ["2024-01-01T12:00:00.000000001Z", "2024-01-01 12:00:00.5", "2024-01-01T12:00:00.123456789+00:00"]
    want = [NOON * 10**9 + rest for rest in (1, 123_456_789, 500_000_000)]
    assert stored(tmp_path, texts, timestamp_unit="ns")[0] == want
    assert stored(tmp_path, texts[1:2], timestamp_unit="ms")[0] == [NOON * 1000 + 500]
    for text, unit, finer in ((texts[0], "us", "ns"), (texts[1], "s", "ms")):
        with pytest.raises(DataError, match=rf"row 1: timestamp '.*' is no whole number of {unit}; set .*={finer}"):
            stored(tmp_path, [text], timestamp_unit=unit)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("2024-02-30", r"'2024-02-30' is a date or hour that does not exist"),
        ("1969-12-31T23:59:59Z", r"is before 1970"),
        ("1970-01-01T00:00:00+02:00", r"is before 1970"),
        ("2024-01-01 12:00:00 Europe/Berlin", r"is not a number, and no ISO time"),
        ("2024-01-01T12:00:00+99:00", r"is not a number, and no ISO time"),
        ("9" * 300 + "x", r"'9{199} is not a number, and no ISO time"),
        ("01/02/2024", r"is not a number, and no ISO time"),
        ("9999-12-31", r"'9999-12-31' is in the future for timestamp_unit=s"),
        (str(NOON * 1000), rf"'{NOON}000' is in the future .*in ms it is 2024-01-01T12:00:00Z: set timestamp_unit=ms"),
        ("20240101120000", r"in the future .*a date written as YYYYMMDDhhmmss: write it .* 2024-01-01T12:00:00"),
    ],
)
def test_a_text_that_is_no_good_time(tmp_path, text, match):
    with pytest.raises(DataError, match=rf"e\.csv: row 2: timestamp .*{match}"):
        stored(tmp_path, [str(NOON), text])
    assert stored(tmp_path, [str(NOON), text], checks=DROP)[0] == [NOON]


UTC_US, NAIVE_NS = pa.timestamp("us", "UTC"), pa.timestamp("ns")


@pytest.mark.parametrize(
    ("odd", "type", "check", "match"),
    [
        (dt.datetime(9999, 12, 31), pa.timestamp("us"), "future_times", r"'9999-12-31 00:00:00' is in the future"),
        (dt.datetime(9999, 12, 31), UTC_US, "future_times", r"'9999-12-31 00:00:00\+00' is in the future"),
        (dt.date(9999, 12, 31), pa.date32(), "future_times", r"'9999-12-31' is in the future"),
        (dt.datetime(1, 1, 1), pa.timestamp("us"), "bad_times", r"'0001-01-01 00:00:00' is before 1970"),
        (dt.datetime(1, 1, 1), pa.timestamp("ms", "UTC"), "bad_times", r"'0001-01-01 00:00:00\+00' is before 1970"),
        (dt.date(1, 1, 1), pa.date32(), "bad_times", r"'0001-01-01' is before 1970"),
        (None, UTC_US, "bad_times", r" is empty \(null\)"),
        (2**63 - 1, pa.timestamp("us"), "bad_times", r"'infinity' is not a finite time"),
        (-(2**63) + 1, UTC_US, "bad_times", r"'-infinity' is not a finite time"),
        (4_611_686_018_427_000_000, UTC_US, "future_times", r"'148108-07-06 14:00:27\+00' is in the future"),
        (-(2**63) + 2, NAIVE_NS, "bad_times", r"'(1677-09-21|-9223).*' is before 1970"),
        (2**63 - 2, NAIVE_NS, "bad_times", r"'2262-04-11 .*' is no whole number of s"),
        (2**31 - 2, pa.date32(), "bad_times", r"'5881580-07-10' does not fit int64"),
    ],
)
def test_sentinels_obey_the_policy_and_name_the_row(tmp_path, odd, type, check, match):
    good = pa.array(GOOD, pa.timestamp("us")).cast(type)
    far = pa.array([odd], pa.int32() if pa.types.is_date(type) else pa.int64()) if isinstance(odd, int) else None
    values = pa.concat_arrays([good[:2], pa.array([odd], type) if far is None else far.cast(type), good[2:]])
    with pytest.raises(DataError, match=rf"e\.parquet: row 3: timestamp{'' if odd is None else ' '}{match}") as caught:
        stored(tmp_path, values)
    assert f"(0 more such rows in this file; checks.{check}=drop drops them)" in str(caught.value)
    times, figures = stored(tmp_path, values, checks={check: "drop"})
    assert times == [int(at.replace(tzinfo=dt.UTC).timestamp()) for at in GOOD] and figures["checks"][check] == 1


def test_int96_and_nanoseconds_that_are_far_from_today(tmp_path):
    """Spark wrote INT96 for years: nanoseconds by name, but of any year."""
    source = tmp_path / "int96.parquet"
    times = pa.array([*GOOD, dt.datetime(2200, 1, 1)], pa.timestamp("us"))
    table = pa.table({"user_id": [1] * 4, "item_id": [1, 2, 3, 4], "timestamp": times})
    pq.write_table(table, source, use_deprecated_int96_timestamps=True)
    with pytest.raises(DataError, match=r"int96\.parquet: row 4: timestamp '2200-01-01 00:00:00' is in the future"):
        ingest(IngestConfig(input=[str(source)], out=str(tmp_path / "s")))
    with pytest.raises(DataError, match=r"row 2: timestamp '2500-.*' is in the future"):
        stored(tmp_path, pa.array([GOOD[0], dt.datetime(2500, 1, 1)], pa.timestamp("us")))
    with pytest.raises(DataError, match=r"row 2: timestamp '2500-.*' does not fit int64 in timestamp_unit=ns"):
        stored(tmp_path, pa.array([GOOD[0], dt.datetime(2500, 1, 1)], pa.timestamp("us")), timestamp_unit="ns")


@pytest.mark.parametrize("statistics", [True, False])
def test_milliseconds_beyond_duckdb_name_the_row(tmp_path, statistics):
    """DuckDB cannot read such a file at all, so no policy drops the row."""
    source = tmp_path / "e.parquet"
    times = pa.array([NOON * 1000] * 5 + [2**62], pa.timestamp("ms"))
    table = pa.table({"user_id": [1] * 6, "item_id": [1] * 6, "timestamp": times})
    pq.write_table(table, source, row_group_size=4, write_statistics=statistics)
    match = r"e\.parquet: row 6: timestamp 4611686018427387904 \(ms since 1970\) is after the year 290,000, and 0 more"
    with pytest.raises(DataError, match=match):
        ingest(IngestConfig(input=[str(source)], out=str(tmp_path / "s")))


def impressions_of(folder: Path, times: pa.Array, **settings) -> list[int]:
    """Times of impressions beside a store of 2024, as they are stored."""
    stored(folder, pa.array(GOOD, pa.timestamp("us")))
    shown = {"user_id": [1] * len(times), "item_id": [[0, 1]] * len(times), "click": [[1, 0]] * len(times)}
    pq.write_table(pa.table({**shown, "timestamp": times}), folder / "shown.parquet")
    lists = ImpressionConfig(input=[str(folder / "shown.parquet")], label_columns=["click"], **settings)
    ingest_impressions(lists, out=str(folder / "store"))
    (table,) = [pq.read_table(path) for path in (folder / "store/impressions").glob("bucket=*/*")]
    return table["timestamp"].to_pylist()


def test_impressions_take_the_same_forms(tmp_path):
    for times in (["2024-01-01T14:00:00+02:00"], pa.array([NOON], pa.timestamp("s", "Asia/Kolkata")), [float(NOON)]):
        assert impressions_of(tmp_path, pa.array(times)) == [NOON]
    assert impressions_of(tmp_path, pa.array([NOON * 1000]), timestamp_unit="ms") == [NOON]
    for unit, rest in (("ms", 999), ("us", 500_000), ("ns", 1)):  # timestamp_unit is of numbers, as for candidates
        per_second = {"ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
        assert impressions_of(tmp_path, pa.array([NOON * per_second + rest], pa.timestamp(unit))) == [NOON]


@pytest.mark.parametrize(
    ("times", "unit", "match"),
    [
        (pa.array([NOON, NOON * 1000]), "s", r"row 2: timestamp 55971-.* \(1704110400000 in timestamp_unit=s\) cannot "
         r"belong to the events of this store, nor can 0 more.*in ms it is 2024-01-01T12:00:00Z: set "
         r"impressions\.timestamp_unit=ms"),
        (pa.array([NOON, NOON]), "ms", r"row 1: timestamp 1970-01-20T.*nor can 1 more.*set impressions.*_unit=s"),
        (pa.array([20240101]), "s", r"row 1: timestamp 1970-08-23.*YYYYMMDD: write it as an ISO time or date, 2024-01"),
        (pa.array([dt.datetime(9999, 12, 31)], pa.timestamp("us")), "s", r"row 1: timestamp 9999-.*drop or repair"),
        (pa.array([float(NOON)], pa.float32()), "s", r"column 'timestamp' is float of 32 bits, which knows times to"),
        (pa.array(["2024-02-30"]), "s", r"row 1: timestamp is empty, negative, no time, or no whole number"),
    ],
)  # fmt: skip
def test_impressions_that_cannot_belong_to_the_store(tmp_path, times, unit, match):
    with pytest.raises(DataError, match=rf"shown\.parquet: impression .*{match}"):
        impressions_of(tmp_path, times, timestamp_unit=unit)
    assert not (tmp_path / "store/impressions/manifest.json").exists()
