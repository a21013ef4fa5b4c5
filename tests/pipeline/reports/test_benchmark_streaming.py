"""suite=streaming end to end on tiny shapes, and what it makes of its figures."""

import json
import os
import subprocess

import helpers
import pytest

from elastic_rec.pipeline.reports.benchmarks.config import StreamingTargets
from elastic_rec.pipeline.reports.benchmarks.streaming import Fold, Pass, judge

TINY = ["device=cpu", "threads=1", "model.width=16", "model.experts=4", "memory.num_keys=16", "suite=streaming"]
SHORT = ["streaming.events=[10,500]", "streaming.pass_events=[64,512]", "streaming.repetitions=2"]
EASY = [f"streaming.targets.{item}" for item in ("fold_ratio=50", "slope_min=-5", "slope_max=5", "pass_gib=2")]


def benchmark(*overrides: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        helpers.command("benchmark", *TINY, *overrides), capture_output=True, text=True, env=environment, timeout=300
    )


def test_a_run_writes_its_figures_in_both_forms(tmp_path):
    done = benchmark("check=true", f"out={tmp_path}", *SHORT, *EASY)
    assert done.returncode == 0, done.stderr[-4000:]
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["missed"] == [] and last["targets"] == 4 and len(last["state_bytes"]) == 1
    saved = json.loads((tmp_path / "streaming.json").read_text())
    assert [fold["events"] for fold in saved["folds"]] == [10, 500] and len(saved["folds"][0]["samples_s"]) == 2
    for row in saved["passes"]:  # a process with torch in it, not one tensor
        assert 2**27 < row["peak_rss_bytes"] < 2**31 and len(row["samples_s"]) == 3
    text = (tmp_path / "streaming.md").read_text()
    ms = Fold(**saved["folds"][1]).seconds * 1e3
    assert f"| 500 | {ms:.2f} ms | {last['state_bytes'][0]:,} |" in text
    assert last["fold_ms"]["500"] == pytest.approx(ms, abs=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["streaming.events=[500,10]"], "streaming.events=[500, 10]: give one or more numbers in ascending order"),
        (["streaming.repetitions=0"], "streaming.repetitions=0: set at least 1"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_do(tmp_path, overrides, message):
    done = benchmark(f"out={tmp_path}", *overrides)
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


def test_verdicts():
    targets = StreamingTargets(fold_ratio=1.2, pass_gib=2, slope_min=0.9, slope_max=1.1)
    folds = [Fold(10, 100, [1.0, 9.0, 1.1]), Fold(1000, 100, [1.3])]
    passes = [Pass(10, 2**30, [1.0]), Pass(1000, 2**31, [100.0])]
    assert [(verdict.value, verdict.met) for verdict in judge(folds, passes, targets)] == [
        (pytest.approx(1.3 / 1.1), True), (1, True), (2.0, True), (pytest.approx(1.0), True)
    ]  # fmt: skip
    folds[1].samples_s, folds[1].state_bytes, passes[1].samples_s = [1.4], 101, [200.0]
    passes[1].peak_rss_bytes += 1
    assert not any(verdict.met for verdict in judge(folds, passes, targets))
    assert not judge(folds, passes[:1], targets)[-1].met  # one length has no slope, and that is no pass
