"""One contract, two engines: a store that Spark made is the store that DuckDB made, value for value and byte for byte.

Spark runs for real, in local mode: a JVM, Python workers, two cores.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_store_reference import QUICK, pick, random_events, reference_histories, stored_histories, write_events
from helpers import command

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.checks import SEQ, ChecksConfig
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.engines.spark.tasks import ABOUT, WriteJob, write_buckets
from elastic_rec.feature_store.table.location import open_location
from elastic_rec.feature_store.table.schema import history_schema
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError

CONTEXT = ["action", "rating"]
DROP = {name: "drop" for name in ("null_ids", "null_words", "bad_times", "future_times", "out_of_order", "gaps")}


@pytest.fixture(scope="module")
def spark():
    sql = pytest.importorskip("pyspark.sql", reason="no PySpark: pip install 'elastic-rec[spark]'")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("no Java: Spark needs 17 or newer")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = sql.SparkSession.builder.master("local[2]")
    for key, value in QUICK.items():
        builder = builder.config(key, value)
    session = builder.getOrCreate()
    yield session
    session.stop()


@pytest.fixture
def any_order(spark, monkeypatch):
    """Rows come out of a shuffle in any order. On one machine it is the old one, which would hide a missing key."""
    from pyspark.sql import functions as F

    from elastic_rec.feature_store.ingestion.engines.spark.engine import SparkEngine

    load_inputs = SparkEngine.load_inputs

    def load_and_shuffle(engine, *arguments, **settings):
        entries = load_inputs(engine, *arguments, **settings)
        engine._events = engine._events.orderBy(F.rand(1)).persist()
        engine._staged.append(engine._events)
        return entries

    monkeypatch.setattr(SparkEngine, "load_inputs", load_and_shuffle)


def dirty_rows(num_rows: int, *, strings: bool) -> pa.Table:
    """Text, as in a log, in order of time but for some; every check finds something, contexts are null now and then."""
    rng = np.random.default_rng(5)
    events = random_events(num_rows, strings=strings)
    late = rng.random(num_rows) < 0.05
    events = [events[n] for n in np.argsort([e["timestamp"] + 20 * l for e, l in zip(events, late, strict=True)])]
    columns = {
        "user_id": [str(e["user"]) for e in events],
        "item_id": [str(e["item"]) for e in events],
        "timestamp": [str(e["timestamp"]) for e in events],
        "event_id": [str(e["event_id"] % 40) for e in events],
        "action": [e["action"] for e in events],
        "rating": [str(e["rating"]) for e in events],
    }
    for name, value in (("user_id", ""), ("item_id", ""), ("item_id", "nan"), ("timestamp", "x"),
                        ("timestamp", "99999999999"), ("action", ""), ("rating", "")):  # fmt: skip
        for row in rng.integers(40, num_rows, 4):
            columns[name][row] = value
    columns["timestamp"][:3] = "3", "3", "1"
    table = pa.table(columns)
    return pa.concat_tables([table, table.slice(num_rows // 3, 40)])  # and some rows come twice


def three_files(folder: Path, table: pa.Table | list, suffix: str) -> list[str]:
    """Not in the order of their names: the order of `input` breaks ties."""
    paths, edges = [], [0, 300, 310, len(table)]
    for name, start, stop in zip(["b", "c[1]", "a"], edges, edges[1:], strict=False):
        path = folder / f"{name}.{suffix}"
        if isinstance(table, list):
            write_events(path, table[start:stop])
        elif suffix == "parquet":
            pq.write_table(table.slice(start, stop - start), path)
        else:
            pa.csv.write_csv(table.slice(start, stop - start), path)
        paths.append(str(path))
    return paths


def both(folder: Path, inputs: list[str], **settings) -> tuple[Store, Store, dict, dict]:
    """The stores of DuckDB and of Spark, and their figures."""
    config = IngestConfig(**{"input": inputs, "num_buckets": 4, "row_group_events": 60, "threads": 1, **settings})
    figures = [ingest(replace(config, engine=name, out=str(folder / name))) for name in ("duckdb", "spark")]
    return Store.open(folder / "duckdb"), Store.open(folder / "spark"), *figures


def tables(store: Store) -> dict[str, list]:
    """Every value of a store, read by plain pyarrow."""
    return {
        path.relative_to(store.path).as_posix(): pq.ParquetFile(path).read().to_pylist()
        for path in sorted(Path(store.path).rglob("*.parquet"))
    }


def check_equal(duckdb: Store, spark: Store, of_duckdb: dict, of_spark: dict) -> None:
    values = tables(duckdb)
    assert list(values) == list(found := tables(spark))
    for name in values:
        assert found[name] == values[name], name
    for key, value in asdict(duckdb.manifest).items():
        assert asdict(spark.manifest)[key] == value, key
    spark.verify()
    assert (Path(spark.path) / "manifest.json").read_bytes() == (Path(duckdb.path) / "manifest.json").read_bytes()
    assert {p.relative_to(spark.path) for p in Path(spark.path).rglob("*")} == {
        p.relative_to(duckdb.path) for p in Path(duckdb.path).rglob("*")
    }
    measured = ("store", "seconds", "events_per_s", "peak_memory_bytes")
    assert {k: v for k, v in of_spark.items() if k not in measured} == {
        k: v for k, v in of_duckdb.items() if k not in measured
    }


@pytest.mark.parametrize(("suffix", "strings"), [("csv", False), ("parquet", True)])
def test_ties_over_several_files(any_order, tmp_path, suffix, strings):
    """The tie-break is the order of files and rows, which no shuffle of Spark's keeps by itself."""
    events = random_events(900, strings=strings)
    stores = both(tmp_path, three_files(tmp_path, events, suffix), context_columns=CONTEXT)
    check_equal(*stores)
    names = ["timestamp", "item", *CONTEXT]
    want = pick(reference_histories(events), names)
    assert pick(stored_histories(stores[1], ["item", *CONTEXT]), names) == want
    assert strings or min(want) < 0
    # Without the input's order the same events give other histories.
    assert pick(reference_histories(events[310:] + events[:310]), names) != want


@pytest.mark.parametrize("strings", [False, True])
def test_every_filter_and_every_policy(any_order, tmp_path, strings):
    table = dirty_rows(1200, strings=strings)
    inputs = three_files(tmp_path, table, "csv")
    settings = {"context_columns": CONTEXT, "event_id_column": "event_id", "max_history": 30, "min_item_events": 20,
                "min_user_events": 4, "first_time": "2", "end_time": "1000047", "min_vocabulary_count": 25}  # fmt: skip
    checks = ChecksConfig(**DROP, max_gap_days=5)
    stores = both(tmp_path / "drop", inputs, **settings, checks=checks)
    check_equal(*stores)
    figures = stores[3]
    assert all(count > 0 for name, count in figures["checks"].items() if name != "wrong_clock")
    assert all(figures[f"dropped_{what}"] > 0 for what in ("events", "users", "items", "duplicates"))
    # Rare items share the unknown id, so there are such events.
    assert sum(stores[1].vocabulary("item").counts) < stores[1].num_events
    keep = ChecksConfig(**DROP | {"out_of_order": "keep", "gaps": "keep"}, duplicates="keep", max_gap_days=5)
    settings = {"context_columns": ["rating"], "event_id_column": "event_id", "max_history": 20}
    check_equal(*both(tmp_path / "keep", inputs, **settings, checks=keep))  # equal events among the oldest kept


def test_typed_files_of_one_day(spark, tmp_path):
    """Timestamps as Arrow has them, float and bool contexts, null contexts, names that SQL would trip over."""
    rng = np.random.default_rng(1)
    n = 400
    table = pa.table(
        {
            "user_id": rng.integers(-(1 << 62), 1 << 62, 20)[rng.integers(0, 20, n)],
            "item_id": pa.array(rng.integers(0, 9, n).astype(str)).dictionary_encode(),
            "timestamp": pa.array(rng.integers(0, 99, n) * 10**6, pa.timestamp("us")),
            "count": pa.array(rng.random(n).round(1), mask=rng.random(n) < 0.1),
            "Select": rng.random(n) < 0.5,
        }
    )
    check_equal(*both(tmp_path, three_files(tmp_path, table, "parquet"), context_columns=["count", "Select"]))


@pytest.mark.parametrize(
    ("rows", "settings", "match"),
    [
        ({310: ("timestamp", "never")}, {}, r"a\.csv: row 1: timestamp 'never' is not a number"),
        ({5: ("user_id", ""), 400: ("user_id", "")}, {}, r"b\.csv: row 6: user is empty \(null\)"),
        ({5: ("item_id", "None")}, {}, r"b\.csv: row 6: item 'None' is what writers put for a missing id"),
        ({}, {"checks": {"duplicates": "fail"}}, r"duplicate events \(same user, time and event id\), the first of"),
        ({}, {"checks": {"out_of_order": "fail"}}, r"event at \d+ \(s\): out_of_order"),
        ({}, {"min_user_events": 10_000}, r"no users left of \d+ with \d+ events"),
        ({}, {"user_column": "uid"}, r"b\.csv: column 'uid' is missing"),
        ({}, {"again": "b.csv"}, r"b-copy\.csv: the same bytes as .*b\.csv; each row would be counted twice"),
        ({}, {"memory_limit": "much"}, r"DuckDB refused its settings"),
    ],
)
def test_the_same_words_for_what_is_wrong(spark, tmp_path, rows, settings, match):
    table = random_events(600)
    columns = pa.table({
        "user_id": [str(e["user"]) for e in table], "item_id": [str(e["item"]) for e in table],
        "timestamp": [str(e["timestamp"]) for e in table], "event_id": ["7"] * 600,
    }).to_pydict()  # fmt: skip
    for row, (name, value) in rows.items():
        columns[name][row] = value
    inputs = three_files(tmp_path, pa.table(columns), "csv")
    if "again" in settings:
        inputs.append(shutil.copy(tmp_path / settings["again"], tmp_path / "b-copy.csv"))
        settings = {}
    before = sorted(tmp_path.rglob("*"))
    messages = []
    for engine in ("duckdb", "spark"):
        wanted = {**settings, "checks": ChecksConfig(**settings.get("checks", {"duplicates": "keep"}))}
        config = IngestConfig(input=inputs, event_id_column="event_id", **wanted)
        with pytest.raises(DataError, match=match) as caught:
            ingest(replace(config, engine=engine, out=str(tmp_path / "store")))
        messages.append(str(caught.value))
        assert sorted(tmp_path.rglob("*")) == before
    assert messages[0] == messages[1]


def test_inputs_of_every_kind_give_one_store(spark, tmp_path):
    """Packed, quoted and empty text, folders' names as context; decimals, floats, bytes and UUIDs in Parquet."""
    days = tmp_path / "text"
    for name, codec, text in (
        ("dt=1/a.CSV", None, 'user_id;item_id;timestamp\n1;"x\ny";5\n2;z;6\n'),
        ("dt=1/b.csv.gz", "gzip", "user_id,item_id,timestamp,ITEM_ID\n1,x,7,no\n"),
        ("dt=2/c.csv.zst", "zstd", "user_id,item_id,timestamp\n"),
        ("dt=2/d.csv.bz2", "bz2", "user_id\titem_id\ttimestamp\r\n3\tz\t8\r\n"),
        ("_SUCCESS", None, ""),
    ):
        (days / name).parent.mkdir(parents=True, exist_ok=True)
        with pa.output_stream(str(days / name), compression=codec) as file:
            file.write(text.encode())
    duckdb, *others = both(tmp_path, [str(days)], context_columns=["dt"])
    check_equal(duckdb, *others)
    assert duckdb.vocabulary("item").ids.to_pylist() == ["z", "x", "x\ny"]
    ids = [pa.array([Decimal(1), Decimal(2)], pa.decimal128(38, 0)), pa.array([1.0, 3.0]), pa.array([], pa.null())]
    for n, users in enumerate(reversed(ids)):
        columns = {"user_id": users, "USER_ID": users, "timestamp": pa.array(range(n, n + len(users)), pa.int64())}
        columns["item_id"] = pa.array([bytes([n] * 16)] * len(users), pa.uuid() if len(users) else pa.null())
        columns["c"] = pa.array([b"a"] * len(users), pa.binary())
        (tmp_path / f"typed/dt={n}").mkdir(parents=True)
        pq.write_table(pa.table(columns), tmp_path / f"typed/dt={n}/000000_0")
    stores = both(tmp_path, [str(tmp_path / "typed")], context_columns=["dt", "c"], overwrite=True)
    check_equal(*stores)
    assert stores[0].num_events == 4 and stores[0].vocabulary("user").ids.to_pylist() == [1, 2, 3]


def test_an_append_by_duckdb_to_a_store_of_sparks(spark, tmp_path):
    events = random_events(600)
    first, day = (write_events(tmp_path / f"{n}.csv", part) for n, part in enumerate((events[:400], events[400:])))
    _, store, *_ = both(tmp_path, [first])
    append(AppendConfig(input=[day], store=str(store.path), threads=1))
    names = ["timestamp", "item"]
    grown = Store.open(store.path)
    assert pick(stored_histories(grown, ["item"]), names) == pick(reference_histories(events), names)


def test_a_disk_that_only_the_executors_see(spark, tmp_path, monkeypatch):
    """A cluster's most likely mistake: a local `out`. Here the tasks are sent to another folder instead."""
    from pyspark import cloudpickle

    from elastic_rec.feature_store.ingestion.engines.spark import engine

    elsewhere = str(tmp_path / "theirs")
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(engine, "write_buckets", lambda b, job: write_buckets(b, replace(job, target=elsewhere)))
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    source = write_events(tmp_path / "e.csv", random_events(50))
    with pytest.raises(DataError, match=r"part-\w+\.parquet: written by an executor and not seen by the driver; `out`"):
        ingest(IngestConfig(input=[source], out=str(tmp_path / "s"), engine="spark"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.csv", "theirs"]


def test_spark_submit_from_s3_to_s3(spark, s3_server, tmp_path, monkeypatch):
    """The command of docs/how-to/spark.md; Spark itself knows nothing of S3."""
    for key, value in s3_server.items():
        monkeypatch.setenv(key, value)
    events = random_events(500)
    for number in range(2):
        file = write_events(tmp_path / f"{number}.parquet", events[number * 250 :][:250])
        open_location(f"s3://bucket/log/{number}.parquet").replace(Path(file).read_bytes())
    settings = ["data=files", "data.ingest.input=[s3://bucket/log]", "data.ingest.num_buckets=3"]
    submit = [str(Path(sys.executable).parent / "spark-submit"), "--master", "local[2]"]
    submit += [part for key, value in QUICK.items() for part in ("--conf", f"{key}={value}")]
    verb = [*command("ingest")[1:], *settings, "data.ingest.engine=spark", "data.store=s3://bucket/of-spark"]
    done = subprocess.run([*submit, *verb], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-8000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["events"] == 500
    ingest(IngestConfig(input=["s3://bucket/log"], out="s3://bucket/of-duckdb", num_buckets=3, name="events"))
    stores = [Store.open(f"s3://bucket/{name}") for name in ("of-spark", "of-duckdb")]
    assert stores[0].manifest == stores[1].manifest
    stores[0].verify()
    assert {file.below(stores[0].path) for file in stores[0].path.files()} == {
        "manifest.json", *(entry.path for entry in stores[0].manifest.named_files()),
    }  # fmt: skip


@pytest.mark.parametrize("url", ["disk", "memory"])
def test_a_task_that_runs_twice_leaves_the_same_files(tmp_path, url):
    """Spark repeats tasks after a lost machine and, with speculation, side by side."""
    schema = history_schema(user_type="int64", event_id_type=None, context_columns=[])
    (tmp_path / "work").mkdir()
    target = f"memory://{tmp_path.name}" if url == "memory" else str(tmp_path / "store")
    if url == "disk":
        (tmp_path / "store").mkdir()
    job = WriteJob(
        target=target,
        scratch=str(tmp_path / "work"),
        schema=schema,
        row_group_events=3,
        checks=ChecksConfig(),
        unit="s",
        first_rows=np.array([0, 5]),
    )
    seq = [(1 << 40) + n for n in range(8)]
    columns = {"bucket": [0] * 4 + [2] * 4, "user_id": [4, 4, 8, 12, 2, 2, 2, 6], "timestamp": list(range(8))}
    batch = pa.record_batch({**columns, "item": [2] * 8, SEQ: seq})
    answers = []
    for _ in range(2):
        (answer,) = [json.loads(b[ABOUT][0].as_py()) for b in write_buckets([batch], job)]
        answers.append(answer)
        place = open_location(target)
        assert [file.below(place) for file in place.files()] == [entry["path"] for entry in answer["file"]]
    assert answers[0] == answers[1] and [entry["num_events"] for entry in answers[0]["file"]] == [4, 4]
    assert not list((tmp_path / "work").iterdir())


def test_executors_need_no_torch():
    module = "elastic_rec.feature_store.ingestion.engines.spark.tasks"
    code = f"import sys; sys.modules.update(dict.fromkeys(sys.argv[1:])); import {module}"
    absent = ["torch", "torchrec", "fbgemm_gpu", "pyspark", "pandas", "hydra", "omegaconf", "matplotlib"]
    subprocess.run([sys.executable, "-c", code, *absent], check=True)


def test_a_choice_that_cannot_be_kept_is_refused(monkeypatch, tmp_path):
    with pytest.raises(TypeError, match="engine"):
        AppendConfig(engine="spark")
    with pytest.raises(ValueError, match="spark_master=yarn has no effect on engine=duckdb"):
        IngestConfig(spark_master="yarn")
    for name in ("pyspark", "pyspark.sql", "elastic_rec.feature_store.ingestion.engines.spark.engine"):
        monkeypatch.setitem(sys.modules, name, None)
    source = write_events(tmp_path / "e.csv", random_events(20))
    with pytest.raises(DataError, match=r"engine=spark needs PySpark.*pip install 'elastic-rec\[spark\]'"):
        ingest(IngestConfig(input=[source], out=str(tmp_path / "s"), engine="spark"))
