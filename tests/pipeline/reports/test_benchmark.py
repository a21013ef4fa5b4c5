"""The benchmark verb end to end on tiny shapes, its measurements without figures, and what it makes of its figures."""

import json
import os
import signal
import subprocess

import helpers
import pytest

from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.pipeline.reports.benchmarks.config import EfficiencyConfig, EfficiencyTargets
from elastic_rec.pipeline.reports.benchmarks.efficiency import measure_rows
from elastic_rec.pipeline.reports.benchmarks.efficiency_table import Measurement, Table, figures, judge
from elastic_rec.pipeline.reports.benchmarks.models import INFERENCE_ONLY, MODELS, Setup
from elastic_rec.pipeline.reports.benchmarks.worker import OUT_OF_MEMORY, Task, Worker

TINY = [
    "device=cpu", "threads=1", "model.width=16", "model.experts=4", "memory.num_keys=16", "efficiency.gather_rows=1000",
    "efficiency.repetitions=2", "efficiency.min_sample_s=0.001", "efficiency.memory_limit_gib=0.375",
]  # fmt: skip
EASY = "targets.speedup_events=[64] targets.speedups=[0.0001] targets.no_slower_from=0 targets.slope_max=0 "
EASY += "targets.gather_ratio=0"


def benchmark(*overrides: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        helpers.command("benchmark", *TINY, *overrides), capture_output=True, text=True, env=environment, timeout=300
    )


def targets(text: str) -> list[str]:
    return [f"efficiency.{item}" for item in text.split()]


def test_a_run_writes_table_figures_and_plot_and_survives_want_of_memory(tmp_path):
    done = benchmark("check=true", f"out={tmp_path}", "efficiency.events=[64,8192]", *targets(EASY))
    assert done.returncode == 0, done.stderr[-8000:]
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["missed"] == [] and last["targets"] == 2  # one for each ELASTIC form
    assert (tmp_path / "efficiency.png").read_bytes().startswith(b"\x89PNG")

    saved = json.loads((tmp_path / "efficiency.json").read_text())
    assert saved["threads"] == 1 and saved["device"] == "cpu" and saved["machine"]["cores"] >= 1
    cells = {(cell["model"], cell["mode"], cell["events"]): cell for cell in saved["cells"]}
    assert len(cells) == 2 * (len(MODELS) * 2 - len(INFERENCE_ONLY))
    for (name, mode, events), cell in cells.items():
        if name == "naive" and events == 8192:  # 2 x 8192 x 8192 floats are 512 MiB
            assert cell["status"] == OUT_OF_MEMORY and cell["seconds"] is None, (mode, cell)
        elif events == 64:
            assert cell["status"] == "ok", cell
            assert cell["seconds"] > 0 and len(cell["samples_s"]) == 2 and cell["peak_bytes"] > 0
    for name in ("elastic", "elastic_causal", "sasrec", "gather"):  # the process that ran short went on
        assert cells[name, "inference", 8192]["status"] == "ok"

    text = (tmp_path / "efficiency.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| 8,192 |"))
    assert OUT_OF_MEMORY in row and " ms · " in row
    assert "threads 1" in text and "Log-log slope" in text
    assert "SASRec-SDPA / ELASTIC |" in text and "ELASTIC / gather" in text


def test_a_missed_target_is_named_last(tmp_path):
    few = ["efficiency.models=[elastic,sasrec]", "efficiency.modes=[inference]", "efficiency.events=[64]"]
    hard = targets(EASY + " targets.speedups=[1e9]")
    done = benchmark("check=true", f"out={tmp_path}", *few, *hard)
    assert done.returncode == 1, done.stderr[-8000:]
    figures_line, last = done.stdout.strip().splitlines()[-2:]
    assert last.startswith("missed: ELASTIC speed-up over SASRec-SDPA at N=64: ") and last.endswith("at least 1e+09x")
    assert len(json.loads(figures_line)["missed"]) == 1
    assert "docs/reference/config.md" not in done.stderr  # nothing was wrong with the config
    assert "| **missed** |" in (tmp_path / "efficiency.md").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "efficiency.models=[elastic,gru]",
            "efficiency.models=['elastic', 'gru']: set one of elastic, elastic_causal, ",
        ),
        ("efficiency.events=[256,64]", "efficiency.events=[256, 64]: give one or more numbers in ascending order"),
        ("efficiency.targets.speedups=[1]", "give as many speed-ups as lengths"),
    ],
)
def test_a_config_that_cannot_work_says_what_to_do(tmp_path, override, message):
    done = benchmark(f"out={tmp_path}", override)
    assert done.returncode != 0 and message in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def worker():
    tower = TowerConfig(width=16, heads=2, experts=4, dropout=0.0)
    setup = Setup(tower, MemoryConfig(num_keys=16), gather_rows=1000, device="cpu", seed=0)
    worker = Worker(setup, threads=1, memory_limit_gib=1)
    yield worker
    worker.close()


def test_peak_memory_is_what_is_held_at_once(worker):
    """The gather's inference holds its output and nothing else; naive attention's grows with N², ELASTIC's with N."""
    assert worker.ask(Task("gather", "inference", 512, 0), timeout_s=60).peak_bytes == 512 * 16 * 4
    peaks = {
        (name, events): worker.ask(Task(name, "inference", events, 0), timeout_s=60).peak_bytes
        for name in ("naive", "elastic")
        for events in (1024, 2048)
    }
    assert 3.5 < peaks["naive", 2048] / peaks["naive", 1024] < 4.1
    assert peaks["naive", 2048] > 2 * 2 * 2048**2 * 4  # scores and weights, two heads
    assert 1.8 < peaks["elastic", 2048] / peaks["elastic", 1024] < 2.1


def test_a_killed_worker_is_a_measurement_and_the_next_one_goes_on(worker):
    os.kill(worker._process.pid, signal.SIGSTOP)  # so that the task is still unanswered when the kill comes
    worker._pipe.send(Task("gather", "inference", 64, 0))
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.join()
    assert worker.ask(Task("gather", "inference", 64, 0), timeout_s=60).status == f"{OUT_OF_MEMORY} (killed)"
    assert worker.ask(Task("gather", "inference", 64, 3), timeout_s=60).status == "ok"


def test_what_would_take_too_long_is_skipped_and_says_so(worker):
    config = EfficiencyConfig(
        events=[64, 128, 256], models=["elastic", "gather"], modes=["inference"], repetitions=1, max_call_s=1e-9
    )
    lines, rows_saved = [], []
    for table in measure_rows(config, worker, lines.append):
        rows_saved.append(len(table.found))
    assert rows_saved == [2, 4, 6] and len(lines) == 3
    assert table.found["elastic", "inference", 128].status == "ok"  # of one length nothing follows
    assert table.found["elastic", "inference", 256].status == "skipped: 0 s predicted, limit 1e-09 s"
    assert "skipped" in lines[2]
    config.max_call_s, config.memory_limit_gib = 60, 1e-9
    *_, table = measure_rows(config, worker, lines.append)
    assert table.found["elastic", "inference", 256].status == "out of memory (0 GiB predicted, limit 1e-09 GiB)"


def made_up(curves: dict[str, dict[int, float | None]]) -> Table:
    table = Table()
    for name, curve in curves.items():
        for events, seconds in curve.items():
            status = "ok" if seconds else OUT_OF_MEMORY
            table.add(Measurement(name, "inference", events, status=status, seconds=seconds, peak_bytes=2**20))
    return table


def test_ratios_slopes_and_verdicts():
    lengths = [256, 1024, 4096, 16384]
    table = made_up(
        {
            "elastic": {n: 1e-6 * n for n in lengths},
            "sasrec": {n: 1e-9 * n**2 for n in lengths[:-1]} | {16384: None},
            "gather": {n: 1e-7 * n for n in lengths},
        }
    )
    found = figures(table, EfficiencyTargets(slope_from=1024))
    assert found["slopes"]["inference"] == pytest.approx({"elastic": 1.0, "sasrec": 2.0, "gather": 1.0})
    ratios = found["ratios"]["inference"]
    assert ratios["sasrec over elastic"] == pytest.approx({256: 0.256, 1024: 1.024, 4096: 4.096})
    assert ratios["elastic over gather"] == pytest.approx(dict.fromkeys(lengths, 10.0))

    wanted = EfficiencyTargets(
        speedup_events=[4096, 16384],
        speedups=[4, 12],
        no_slower_from=1024,
        slope_from=256,
        slope_min=0.9,
        slope_max=1.1,
        gather_from=4096,
        gather_ratio=4,
    )
    verdicts = judge(table, wanted)
    assert [verdict.met for verdict in verdicts] == [True, False, True, True, False]
    assert verdicts[1].text == "not measured"  # which is no pass
    assert judge(table, EfficiencyTargets()) == []
    assert not judge(table, EfficiencyTargets(no_slower_from=256))[0].met
    assert not judge(table, EfficiencyTargets(slope_max=0.99))[0].met


def test_measurements_read_well():
    found = Measurement("elastic", "inference", 64, seconds=0.01234, peak_bytes=5 * 2**20)
    assert found.text == "12.3 ms · 5 MiB"
    found.seconds, found.peak_bytes = 4.2e-5, 3 * 2**30
    assert found.text == "42 µs · 3.0 GiB"
    found.seconds, found.status = None, "skipped: 70 s predicted, limit 60 s"
    assert found.text == "skipped: 70 s predicted, limit 60 s"


def test_far_back_trains_and_says_which_model_found_it(tmp_path):
    tiny = [
        "suite=far_back", f"out={tmp_path}", "memory.enabled=false", "far_back.markers=4", "far_back.noise_items=10",
        "far_back.distances=[24,200]", "far_back.train_distance=64", "far_back.window=40", "far_back.steps=200",
        "far_back.step_events=2048", "far_back.users=200", "far_back.learning_rate=0.01",
    ]  # fmt: skip
    done = benchmark(*tiny)
    assert done.returncode == 0, done.stderr[-8000:]
    last = json.loads(done.stdout.strip().splitlines()[-1])
    assert last["ELASTIC causal at 24"] > 0.6 and last["ELASTIC causal, newest 40 at 200"] < 0.45, last
    assert last["SASRec, newest 40 at 200"] < 0.45, "chance is a quarter"
    assert "| 200 | 200 (standard error" in (tmp_path / "far_back.md").read_text()
    assert (tmp_path / "far_back.png").read_bytes().startswith(b"\x89PNG")
