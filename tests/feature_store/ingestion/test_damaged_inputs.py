"""200 damaged inputs, seeded: each is ingested under its policies or refused in one message; nothing crashes, hangs, or
leaves a store that opens.

Ingest runs in a worker process: a dead worker (segfault, abort) and one that does not answer are both failures.
"""

from __future__ import annotations

import gzip
import io
import json
import selectors
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import fail

from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError

NUM_CASES, PATIENCE_S = 200, 60.0  # far more than a case takes, less than anybody would wait
# Reads a config per line; answers {"figures"} or {"refused"} or, for anything that is no DataError, {"bug"}.
WORKER = """
import json, sys, traceback
from elastic_rec.feature_store.ingestion.checks import ChecksConfig
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest

for line in sys.stdin:
    settings = json.loads(line)
    try:
        settings["checks"] = ChecksConfig(**settings["checks"])
        answer = {"figures": ingest(IngestConfig(**settings))}
    except DataError as error:
        answer = {"refused": str(error)}
    except BaseException:
        answer = {"bug": traceback.format_exc()}
    print(json.dumps(answer), flush=True)
"""


class Worker:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    def __call__(self, settings: dict) -> dict:
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        if not self.selector.select(PATIENCE_S):
            self.process.kill()
            return {"bug": f"no answer in {PATIENCE_S} s"}
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"bug": f"the interpreter died: {self.process.wait()}"}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=PATIENCE_S)
        self.selector.close()
        self.process.stdout.close()


def base_columns(rng: np.random.Generator, num_rows: int = 60) -> dict[str, pa.Array]:
    return {
        "user_id": pa.array(rng.integers(1, 9, num_rows)),
        "item_id": pa.array(rng.integers(1, 30, num_rows)),
        "timestamp": pa.array(rng.integers(10**9, 10**9 + 10**6, num_rows)),
        "event_id": pa.array(rng.permutation(num_rows)),
        "action": pa.array(rng.choice(["view", "buy"], num_rows)),
    }


def bad_utf8(n: int) -> pa.Array:
    data = b"\xff\xfe" * n
    return pa.StringArray.from_buffers(n, pa.py_buffer(np.arange(0, 2 * n + 1, 2, np.int32)), pa.py_buffer(data))


def with_nulls(rng: np.random.Generator, column: pa.Array) -> pa.Array:
    return pa.array([None if rng.random() < 0.2 else value for value in column.to_pylist()], column.type)


# Each takes (rng, a column of 60 values) and gives one in its place.
COLUMNS = {
    "nulls": with_nulls,
    "all null": lambda rng, c: pa.nulls(len(c)),
    "float": lambda rng, c: pa.array(rng.random(len(c))),
    "nan": lambda rng, c: pa.array(np.where(rng.random(len(c)) < 0.2, np.nan, rng.integers(0, 99, len(c)))),
    "infinite": lambda rng, c: pa.array(np.where(rng.random(len(c)) < 0.2, np.inf, 5.0)),
    "bool": lambda rng, c: pa.array(rng.random(len(c)) < 0.5),
    "negative": lambda rng, c: pa.array(-rng.integers(0, 9, len(c))),
    "least int64": lambda rng, c: pa.array(rng.choice([-(2**63), 2**63 - 1, 0], len(c))),
    "2^63": lambda rng, c: pa.array(rng.choice(np.array([2**63, 5], np.uint64), len(c))),
    "uint64 max": lambda rng, c: pa.array(np.full(len(c), 2**64 - 1, np.uint64)),
    "int8": lambda rng, c: pa.array(rng.integers(-128, 128, len(c)).astype(np.int8)),
    "text": lambda rng, c: pa.array(rng.choice(["a", "", "7", "07", "ü\x00", "' OR 1=1 --", '"'], len(c))),
    "long text": lambda rng, c: pa.array(["x" * 200_000, *["y"] * (len(c) - 1)]),
    "big number as text": lambda rng, c: pa.array([str(2**63)] * len(c)),
    "not utf-8": lambda rng, c: bad_utf8(len(c)),
    "binary": lambda rng, c: pa.array([b"\xff\x00"] * len(c)),
    "list": lambda rng, c: pa.array([[1, None], None] * (len(c) // 2)),
    "huge list": lambda rng, c: pa.array([list(range(300_000)), *[[]] * (len(c) - 1)]),
    "struct": lambda rng, c: pa.array([{"a": None}, None] * (len(c) // 2)),
    "map": lambda rng, c: pa.array([[("k", None)]] * len(c), pa.map_(pa.string(), pa.int64())),
    "decimal": lambda rng, c: pa.array([1, 2] * (len(c) // 2)).cast(pa.decimal128(38, 5)),
    "date": lambda rng, c: pa.array(rng.integers(0, 20000, len(c)).astype(np.int32)).cast(pa.date32()),
    "time": lambda rng, c: pa.array(rng.integers(0, 1000, len(c))).cast(pa.time64("us")),
    "duration": lambda rng, c: pa.array(rng.integers(0, 1000, len(c))).cast(pa.duration("s")),
    "datetime": lambda rng, c: pa.array(rng.integers(-(10**9), 10**9, len(c))).cast(pa.timestamp("s", "UTC")),
    "far datetime": lambda rng, c: pa.array([2**62] * len(c)).cast(pa.timestamp("us")),
    "dictionary": lambda rng, c: c.dictionary_encode(),
    "null words": lambda rng, c: pa.array(rng.choice(["nan", "None", "a", "b", "2024-01-01"], len(c))),
    "mixed units": lambda rng, c: pa.array(rng.choice([10**9, 10**12, 10**15], len(c))),
}
DROPPED_ALONE = ("null_ids", "null_words", "bad_times", "future_times")
NAMES = ("user_id", "item_id", "timestamp", "event_id", "action")


def parquet_case(rng: np.random.Generator) -> tuple[str, bytes]:
    columns = base_columns(rng)
    names, arrays, what = list(columns), list(columns.values()), []
    for _ in range(rng.integers(0, 3)):
        at, kind = int(rng.integers(len(NAMES))), str(rng.choice(list(COLUMNS)))
        arrays[at] = COLUMNS[kind](rng, arrays[at])
        what.append(f"{names[at]} {kind}")
    twist = rng.choice(["none", "missing", "twice", "renamed", "extra", "empty"], p=[0.6, 0.08, 0.08, 0.08, 0.08, 0.08])
    at = int(rng.integers(len(names)))
    if twist == "missing":
        del names[at], arrays[at]
    elif twist == "twice":
        names.append(names[at])
        arrays.append(arrays[at])
    elif twist == "renamed":
        names[at] = str(rng.choice(['it"em\n', "", "USER_ID", "a" * 5000]))
    elif twist == "extra":
        names.append("more")
        arrays.append(COLUMNS[str(rng.choice(["huge list", "not utf-8", "map", "struct"]))](rng, arrays[0]))
    table = pa.Table.from_arrays(arrays, names)
    if twist == "empty":
        table = table.slice(0, 0)
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=25, compression=str(rng.choice(["none", "snappy", "zstd"])))
    content, damage = damaged(rng, file.getvalue(), share=0.35)
    return f"parquet: {', '.join([*what, str(twist), damage])}", content


def csv_case(rng: np.random.Generator) -> tuple[str, bytes]:
    columns = base_columns(rng)
    rows = [list(NAMES), *map(list, zip(*(map(str, c.to_pylist()) for c in columns.values()), strict=True))]
    cells = ["", "-5", "9223372036854775808", "-9223372036854775809", "1e400", "nan", "2024-01-01", '"', '"a', "a\nb",
             "x" * 3_000_000, "\x00", "ünï", "1_000", " 7", "0x10", "1700000000000",
             "1700000000000000", ",", "null"]  # fmt: skip
    what = []
    for _ in range(rng.integers(0, 4)):
        row, column, cell = int(rng.integers(len(rows))), int(rng.integers(len(NAMES))), str(rng.choice(cells))
        rows[row][column] = cell
        what.append(f"row {row} {NAMES[column]}={cell[:20]!r}")
    twist = rng.choice(["none", "ragged", "short", "crlf", "bom", "tabs", "latin1", "headless", "blank"])
    row = int(rng.integers(1, len(rows)))
    if twist == "ragged":
        rows[row].append("more")
    elif twist == "short":
        rows[row].pop()
    elif twist == "headless":
        rows = rows[1:]
    elif twist == "blank":
        rows.insert(row, [])
    text = ("\r\n" if twist == "crlf" else "\n").join(("\t" if twist == "tabs" else ",").join(r) for r in rows)
    content = ("\ufeff" if twist == "bom" else "").encode() + text.encode()
    if twist == "latin1":
        content = content.replace(b"view", "vüew".encode("latin-1"))
    content, damage = damaged(rng, content, share=0.25)
    return f"csv: {', '.join([*what, str(twist), damage])}", content


def damaged(rng: np.random.Generator, content: bytes, *, share: float) -> tuple[bytes, str]:
    if rng.random() >= share:
        return content, "whole"
    kind = rng.choice(["cut", "flipped", "holed", "doubled"])
    at = int(rng.integers(len(content)))
    if kind == "cut":
        return content[:at], f"cut at {at}"
    if kind == "flipped":
        changed = bytearray(content)
        for place in rng.integers(0, len(content), 5):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed), "flipped"
    if kind == "holed":
        return content[:at] + bytes(min(200, len(content) - at)) + content[at + 200 :], f"holed at {at}"
    return content + content, "doubled"


def case(number: int) -> tuple[str, str, bytes, dict]:
    """(what it is, file name, content, settings)"""
    rng = np.random.default_rng([17, number])
    what, content = (parquet_case if number % 2 else csv_case)(rng)
    name = "e.parquet" if number % 2 else "e.csv"
    if name == "e.csv" and rng.random() < 0.2:
        content, damage = damaged(rng, gzip.compress(content, mtime=0), share=0.5)
        name, what = "e.csv.gz", f"{what}, packed, {damage}"
    policies = {check: str(rng.choice(["fail", "drop"])) for check in DROPPED_ALONE}
    policies["wrong_clock"] = str(rng.choice(["fail", "keep", "keep"]))
    settings = {"event_id_column": "event_id", "context_columns": ["action"], "checks": policies}
    settings["timestamp_unit"] = str(rng.choice(["s", "s", "s", "ms", "us", "ns"]))
    if rng.random() < 0.3:
        settings |= {"event_id_column": None, "context_columns": []}
    return f"case {number}: {what}, {settings}", name, content, settings


def test_200_damaged_inputs(tmp_path):
    worker, outcomes = Worker(), {"figures": 0, "refused": 0}
    for number in range(NUM_CASES):
        what, name, content, settings = case(number)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(content)
        out = folder / "store"
        common = {"input": [str(folder / name)], "out": str(out), "threads": 1, "num_buckets": 2}
        answer = worker(common | settings)
        assert "bug" not in answer, f"{what}\n{answer['bug']}"
        if "refused" in answer:
            outcomes["refused"] += 1
            check_refused(what, folder, name, answer["refused"])
        else:
            outcomes["figures"] += 1
            check_ingested(what, out, settings["checks"], answer["figures"])
    worker.close()
    assert min(outcomes.values()) >= 30, outcomes  # both ends are met often enough to mean something


def check_refused(what: str, folder: Path, name: str, message: str) -> None:
    assert name in message or "no users left" in message or "user " in message, f"{what}\n{message}"
    assert len(message) < 2000 and "Traceback" not in message, f"{what}\n{message[:3000]}"
    assert [path.name for path in folder.iterdir()] == [name], what
    with pytest.raises(DataError):
        Store.open(folder / "store")


def check_ingested(what: str, out: Path, policies: dict[str, str], figures: dict) -> None:
    store = Store.open(out)
    store.verify()
    checks = figures["checks"]
    assert all(checks[name] == 0 for name, policy in policies.items() if policy == "fail"), what
    dropped = figures["read_events"] - figures["events"]
    alone = [checks[name] for name in DROPPED_ALONE]
    # An event may fail two of the checks and is dropped once.
    assert max(alone) + checks["duplicates"] <= dropped <= sum(alone) + checks["duplicates"], what
    tables = [pq.read_table(file.path.open()) for file in store.files]
    assert sum(len(events) for table in tables for events in table["events"].to_pylist()) == figures["events"], what
    for column in ["item", *store.columns]:
        assert store.vocabulary(column).counts.sum() <= figures["events"], what


def test_the_command_refuses_in_one_line_with_code_2(tmp_path):
    (tmp_path / "e.csv").write_bytes(b"user_id,item_id,timestamp\n1,\xff\xfe,3\n")
    code, stderr = fail("ingest", "data=files", f"data.store={tmp_path}/s", f"data.ingest.input=[{tmp_path}/e.csv]")
    assert code == 2 and "Traceback" not in stderr
    assert [line for line in stderr.splitlines() if line.startswith("error: ") and "e.csv: cannot be read" in line]
    assert not (tmp_path / "s").exists()
