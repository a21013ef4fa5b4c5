"""suite=ranking end to end on tiny shapes, and what it makes of its figures."""

import json
import os
import subprocess

import helpers
import pytest

from elastic_rec.pipeline.reports.benchmarks.config import RankingTargets
from elastic_rec.pipeline.reports.benchmarks.ranking import Timing, judge, last_figures

TINY = ["device=cpu", "threads=1", "model.width=16", "model.experts=4", "memory.num_keys=16", "suite=ranking"]
SHORT = ["ranking.events=50", "ranking.candidates=[1,20]", "ranking.state_events=[10,100]", "ranking.repetitions=2"]


def benchmark(*overrides: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        helpers.command("benchmark", *TINY, *overrides), capture_output=True, text=True, env=environment, timeout=300
    )


def test_a_run_writes_its_figures_in_both_forms(tmp_path):
    easy = ["ranking.targets.candidates_ratio=50", "ranking.targets.state_ratio=50"]
    done = benchmark("check=true", f"out={tmp_path}", *SHORT, *easy)
    assert done.returncode == 0, done.stderr[-4000:]
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["missed"] == [] and last["targets"] == 2
    saved = json.loads((tmp_path / "ranking.json").read_text())
    assert len(saved["cells"]) == 3 * 2 + 2 * 2
    assert all(len(cell["samples_s"]) == 2 and min(cell["samples_s"]) > 0 for cell in saved["cells"])
    text = (tmp_path / "ranking.md").read_text()
    ms = {timing.key: timing.seconds * 1e3 for timing in (Timing(**cell) for cell in saved["cells"])}
    assert f"| 20 | {ms['tower', 50, 20]:.2f} ms |" in text
    assert f"| 100 | {ms['state', 100, 1]:.2f} ms | {ms['state', 100, 20]:.2f} ms |" in text
    assert last["tower_ms"]["20"] == pytest.approx(ms["tower", 50, 20], abs=1e-3)


def test_a_missed_target_fails_the_run(tmp_path):
    done = benchmark("check=true", f"out={tmp_path}", *SHORT, "ranking.targets.candidates_ratio=0.01")
    assert done.returncode == 1 and "missed: tower time of 20 candidates over that of 1" in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ranking.candidates=[5,1]", "ranking.candidates=[5, 1]: give one or more numbers in ascending order"),
        ("ranking.events=0", "ranking.events=0: set at least 1"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_do(tmp_path, override, message):
    done = benchmark(f"out={tmp_path}", override)
    assert done.returncode == 2 and message in done.stderr and not list(tmp_path.iterdir())


def test_verdicts():
    timings = [Timing("tower", 9, 1, [1.0, 9.0, 1.0]), Timing("tower", 9, 10, [2.0]), Timing("din", 9, 1, [1.0])]
    timings += [Timing("state", 10, n, [1.0]) for n in (1, 10)] + [
        Timing("state", 99, n, [0.9 + n / 10]) for n in (1, 10)
    ]
    found = judge(timings, RankingTargets(candidates_ratio=2, state_ratio=1.2))
    assert [(verdict.value, verdict.met) for verdict in found] == [(2.0, True), (pytest.approx(1.9), False)]
    assert last_figures([*timings, Timing("heads", 0, 1, [1.0])])["state_ms"][10] == {10: 1000.0, 99: 1900.0}
    assert not judge(timings, RankingTargets())
