"""suite=feature_store end to end on a small log, and what it makes of its figures."""

import json
import os
import subprocess
from dataclasses import replace

import helpers
import pytest

from elastic_rec.feature_store.table.store import Store
from elastic_rec.pipeline.reports.benchmarks import feature_store
from elastic_rec.pipeline.reports.benchmarks.config import StoreBenchmarkConfig, StoreTargets
from elastic_rec.pipeline.reports.benchmarks.feature_store import Comparison, judge
from elastic_rec.pipeline.reports.benchmarks.raw_events import write_events

SMALL = ["num_users=300", "num_events=20000", "num_items=500", "batch_size=32", "repetitions=2", "ingest_repetitions=1"]
EASY = ["targets.reader_ratio=0.001", "targets.ingest_ratio=0.001", "targets.amplification=9"]


def benchmark(*overrides: str) -> subprocess.CompletedProcess:
    command = helpers.command("benchmark", "suite=feature_store", "device=cpu", *overrides)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_run_writes_its_figures_in_both_forms_and_leaves_nothing_else(tmp_path):
    done = benchmark("check=true", f"out={tmp_path}", *(f"feature_store.{item}" for item in [*SMALL, *EASY]))
    assert done.returncode == 0, done.stderr[-4000:]
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["missed"] == [] and last["targets"] == 4 and len(last["ratios"]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["feature_store.json", "feature_store.md"]
    saved = json.loads((tmp_path / "feature_store.json").read_text())
    assert [len(found["ours_s"]) for found in saved["comparisons"]] == [1, 2, 2, 2, 2]
    text = (tmp_path / "feature_store.md").read_text()
    assert "| reader, workers=2 |" in text and "**missed**" not in text


def test_both_sides_read_every_event(tmp_path):
    suite = StoreBenchmarkConfig(num_users=300, num_events=20_000, num_items=500, ingest_repetitions=1)
    logs = write_events(tmp_path / "log", 300, 20_000, 500, 0)
    feature_store.compare_ingest(suite, logs, tmp_path)
    store = Store.open(tmp_path / "store")
    assert store.num_events == 20_000 and not (tmp_path / "copy").exists()
    assert feature_store.iterate(store, 32) == feature_store.iterate_in_threads(store, 32, 3) == store.num_users
    assert [feature_store.read(store, 32, workers) for workers in (1, 2)] == [20_000] * 2
    # Two row groups to each of many ranks do not exist here: all of them decode them all.
    assert feature_store.read_amplification(replace(suite, readers=1), store) == 1.0
    assert feature_store.read_amplification(replace(suite, readers=20), store) == pytest.approx(20)


def test_a_config_that_cannot_work_says_what_to_do(tmp_path):
    done = benchmark(f"out={tmp_path}", "feature_store.workers=[0]")
    assert done.returncode == 2 and "feature_store.workers=[0]: set at least 1" in done.stderr


def test_verdicts():
    suite = StoreBenchmarkConfig(
        workers=[1], targets=StoreTargets(reader_ratio=0.8, ingest_ratio=0.6, amplification=1.1)
    )
    ingest = Comparison("ingest", "events", 1, [6.0, 1.0, 1.0], [10.0, 10.0, 1.0])
    reader = Comparison("reader", "users", 1, [8.0], [10.0])
    assert [(v.value, v.met) for v in judge([ingest, reader, reader], 1.1, suite)] == [
        (0.6, True),
        (0.8, True),
        (1.1, True),
    ]
    ingest.ours_s[0], reader.ours_s[0] = 11.0, 11.0
    assert not any(verdict.met for verdict in judge([ingest, reader, reader], 1.11, suite))
