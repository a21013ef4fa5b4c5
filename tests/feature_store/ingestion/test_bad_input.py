"""Each kind of bad input: an error that names file, row or column and the remedy, and nothing left on disk."""

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_store_reference import random_events, write_events

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.utils.errors import DataError

HEAD = "user_id,item_id,timestamp\n"
GOOD = "1,2,3\n1,3,4\n2,2,5\n"


def refused(tmp_path, match: str, *, files: dict | None = None, **settings) -> str:
    """Writes files (name -> text, bytes or table), ingests, checks the message and that only the input is there."""
    for name, content in (files or {}).items():
        if isinstance(content, pa.Table):
            pq.write_table(content, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.rglob("*"))
    settings = {"input": [str(tmp_path / name) for name in files or {}], **settings}
    with pytest.raises(DataError, match=match) as caught:
        ingest(IngestConfig(out=str(tmp_path / "store"), threads=1, **settings))
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def test_missing_column_lists_those_there(tmp_path):
    message = refused(
        tmp_path, r"a\.csv: column 'item_id' is missing", files={"a.csv": "user_id,movie,timestamp\n1,2,3\n"}
    )
    assert "it has: user_id, movie, timestamp" in message and "item_column" in message
    table = pa.table({"user_id": [1], "item_id": [2]})
    refused(
        tmp_path, r"p\.parquet: column 'timestamp' is missing; it has: user_id, item_id", files={"p.parquet": table}
    )
    files = {"b.csv": HEAD + GOOD}
    refused(tmp_path, r"column 'mood' is missing.*context_columns", files=files, context_columns=["mood"])
    refused(
        tmp_path, r"column 'user_id' is not unique", files={"c.csv": "user_id,item_id,timestamp,user_id\n1,2,3,4\n"}
    )


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("1,2,yesterday", r"row 4: timestamp 'yesterday' is not a number"),
        ("1,2,01/31/2020", r"row 4: timestamp '01/31/2020' is not a number.*convert dates"),
        ("1,2,", r"row 4: timestamp is empty \(null\)"),
        ("1,2,nan", r"row 4: timestamp 'nan' is not a finite number"),
        ("1,2,inf", r"row 4: timestamp 'inf' is not a finite number"),
        ("1,2,-5", r"row 4: timestamp '-5' is negative"),
        ("1,2,1.5", r"row 4: timestamp '1.5' is fractional in timestamp_unit=s.*timestamp_unit=ms"),
        ("1,2,99999999999999999999", r"row 4: timestamp '9+' does not fit int64; check timestamp_unit"),
        (",2,5", r"row 4: user is empty \(null\); drop"),
        ("1,,5", r"row 4: item is empty \(null\); drop"),
    ],
)
def test_bad_csv_row_is_quoted(tmp_path, row, match):
    # Good rows before and after, a good file before, a worse row behind: the FIRST bad row is named.
    text = HEAD + GOOD + row + "\n" + GOOD + ",,\n"
    refused(tmp_path, r"b\.csv: " + match, files={"a.csv": HEAD + GOOD, "b.csv": text})


@pytest.mark.parametrize(
    ("column", "values", "match"),
    [
        ("timestamp", pa.array([1.0, float("nan")]), r"row 2: timestamp nan is not a finite number"),
        ("timestamp", pa.array([1.0, 2.5]), r"row 2: timestamp 2.5 is fractional"),
        ("timestamp", pa.array([1, -2]), r"row 2: timestamp -2 is negative"),
        ("timestamp", pa.array([1, None]), r"row 2: timestamp is empty"),
        ("timestamp", pa.array([1000, 1500], pa.timestamp("ms")), r"row 2: .* is no whole number of s; set .*=ms"),
        ("timestamp", pa.array([True, False]), r"column 'timestamp' is bool, timestamp_column must be an integer"),
        ("user_id", pa.array([1.0, 2.5]), r"row 2: user 2\.5 does not fit int64 exactly; write it as a string"),
        ("user_id", pa.array([True, False]), r"column 'user_id' is bool, user_column must be int64 or string; cast"),
        ("user_id", pa.array([None, 1]), r"row 1: user is empty"),
        ("item_id", pa.array(["a", None]), r"row 2: item is empty"),
        ("item_id", pa.array(["a", ""]), r"row 2: item is empty"),
        ("item_id", pa.array([[1], [2]]), r"column 'item_id' is list"),
        ("item_id", pa.array([1, 2**63], pa.uint64()), r"row 2: item 9223372036854775808 does not fit int64"),
    ],
)
def test_bad_parquet_value_or_type(tmp_path, column, values, match):
    columns = {"user_id": pa.array([1, 1]), "item_id": pa.array([1, 2]), "timestamp": pa.array([1, 2])}
    refused(tmp_path, r"p\.parquet: " + match, files={"p.parquet": pa.table(columns | {column: values})})


def test_null_event_id(tmp_path):
    files = {"a.csv": "user_id,item_id,timestamp,e\n1,2,3,7\n1,2,3,\n"}
    refused(tmp_path, r"row 2: event_id is empty", files=files, event_id_column="e")


def test_ragged_rows_and_wrong_encoding(tmp_path):
    refused(tmp_path, r"a\.csv: cannot be read", files={"a.csv": HEAD + GOOD + "1,2\n"})
    refused(tmp_path, r"b\.csv: cannot be read", files={"b.csv": HEAD + GOOD + "1,2,3,4\n"})
    refused(tmp_path, r"c\.csv: cannot be read", files={"c.csv": HEAD.encode() + b"1,\xff\xfe,3\n"})
    refused(tmp_path, r"d\.csv: cannot read the header", files={"d.csv": b"\xff" + HEAD.encode() + GOOD.encode()})


def test_empty_files(tmp_path):
    refused(tmp_path, r"a\.csv: empty file \(0 bytes\)", files={"a.csv": ""})
    refused(tmp_path, r"b\.csv: no rows \(a header at most\)", files={"b.csv": HEAD})
    refused(tmp_path, r"c\.csv: no rows", files={"c.csv": HEAD.strip()})
    empty = pa.table({"user_id": pa.array([], pa.int64()), "item_id": [], "timestamp": []})
    refused(tmp_path, r"d\.parquet: no rows", files={"d.parquet": empty})
    refused(tmp_path, r"e\.parquet: empty file", files={"e.parquet": b""})
    refused(tmp_path, r"f\.csv: empty file", files={"ok.csv": HEAD + GOOD, "f.csv": ""})


def test_truncated_files(tmp_path):
    whole = write_events(tmp_path / "whole.parquet", random_events(500))
    content = Path(whole).read_bytes()
    refused(tmp_path, r"cut\.parquet: not readable as Parquet", files={"cut.parquet": content[: len(content) // 2]})
    middle = content[:200] + bytes(100) + content[300:]
    refused(tmp_path, r"holed\.parquet: cannot be read", files={"holed.parquet": middle})
    packed = gzip.compress((HEAD + GOOD * 20000).encode())
    refused(tmp_path, r"cut\.csv\.gz: cannot be read", files={"cut.csv.gz": packed[: len(packed) // 2]})


def test_nothing_matches(tmp_path):
    refused(tmp_path, r"input '.*/none\*\.csv': no file matches", input=[str(tmp_path / "none*.csv")])
    refused(tmp_path, r"input '.*/gone': no file matches", input=[str(tmp_path / "gone")])
    refused(tmp_path, r"input is empty", input=[])


def test_mixed_unknown_or_repeated_inputs(tmp_path):
    table = pa.table({"user_id": [1], "item_id": [2], "timestamp": [3]})
    refused(tmp_path, r"input mixes formats: .*a\.csv is csv", files={"a.csv": HEAD + GOOD, "p.parquet": table})
    refused(tmp_path, r"events\.log: format unknown.*set format", files={"events.log": HEAD + GOOD})
    twice = [str(tmp_path / "a.csv"), str(tmp_path / "*.csv")]
    refused(tmp_path, r"a\.csv: matched twice", input=twice)
    text = pa.table({"user_id": ["1"], "item_id": [2], "timestamp": [3]})
    files = {"p.parquet": table, "q.parquet": text}
    refused(tmp_path, r"q\.parquet: user is text, but int64 in .*p\.parquet", files=files)


def test_filters_that_leave_nobody(tmp_path):
    files = {"a.csv": HEAD + GOOD}
    refused(
        tmp_path, r"no users left of 2 with 3 events after .*min_user_events=9; lower", files=files, min_user_events=9
    )
    refused(tmp_path, r"no users left", min_item_events=9, input=[str(tmp_path / "a.csv")])


def test_wrong_limits(tmp_path):
    refused(tmp_path, r"check memory_limit", files={"a.csv": HEAD + GOOD}, memory_limit="plenty")
    for settings, match in (
        ({"num_buckets": 0}, "num_buckets=0: set at least 1, at most 10000"),
        ({"context_columns": ["gap"]}, "'gap' is reserved"),
        ({"context_columns": ["a.b"]}, "'a.b' is reserved or not made of letters"),
        ({"context_columns": ["a", "A"]}, "given twice"),
        ({"timestamp_unit": "h"}, "timestamp_unit=h: set s or ms or us or ns"),
    ):
        with pytest.raises(ValueError, match=match):
            IngestConfig(**settings)
