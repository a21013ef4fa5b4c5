"""torchrun: its SIGTERM ends all ranks at one step, and with --max-restarts a killed rank's job goes on by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import helpers
from jobs_verbs import wait_until

STEPS = 24


def torchrun(*arguments: str, restarts: int, log: Path, ranks: int = 2) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, f"--max-restarts={restarts}", str(helpers.REPO / "pipeline/train.py"), *arguments]
    with log.open("w") as text:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=text, env=helpers.environment())


def workers(launcher: int) -> dict[int, int]:
    """rank -> process, of torchrun's children."""
    found = {}
    for path in Path(f"/proc/{launcher}/task").glob("*/children"):
        for pid in map(int, path.read_text().split()):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = pid
    return found


def steps_done(run_dir: Path) -> int:
    return max(helpers.train_lines(run_dir), default=0) if (run_dir / "metrics.jsonl").exists() else 0


def test_a_job_is_stopped_then_a_rank_is_killed_and_it_ends_as_if_nothing_had_been(tmp_path):
    store = helpers.make_store(tmp_path / "data")
    fixed = [f"data.store={store}", f"optim.max_steps={STEPS}", "optim.epochs=20"]
    train = [*helpers.SMALL_TRAIN, *fixed, "model.tower=elastic_causal", "data.targets=every_event", "model.chunk=4"]
    helpers.run("train", *train, f"run.dir={tmp_path}/unbroken", ranks=2)

    run_dir, log = tmp_path / "run", tmp_path / "log"
    job = torchrun(*train, f"run.dir={run_dir}", restarts=0, log=log)
    wait_until(lambda: steps_done(run_dir) >= 3)
    job.terminate()
    assert job.wait(timeout=120) != 0
    text, step = log.read_text(), steps_done(run_dir)
    assert step < STEPS and text.count("interrupted by SIGTERM") == 1
    assert f"interrupted by SIGTERM at step {step}, which is saved" in text
    assert (run_dir / f"checkpoints/step-{step:08d}/complete.json").exists()

    job = torchrun(*train, f"run.dir={run_dir}", "run.resume=true", restarts=2, log=log)
    wait_until(lambda: steps_done(run_dir) >= 11)
    os.kill(workers(job.pid)[1], signal.SIGKILL)
    assert job.wait(timeout=240) == 0, log.read_text()
    text = log.read_text()
    assert "error [rank 0]: rank 1 ended without a word" in text and "Traceback" not in text
    assert f"resuming at step {step}" in text and "resuming at step 8 " in text
    assert helpers.train_lines(run_dir) == helpers.train_lines(tmp_path / "unbroken")


def test_a_restart_does_not_go_on_in_a_run_that_is_not_its_own(tmp_path):
    """The first attempt refuses the folder of another run; so must the second."""
    store = helpers.make_store(tmp_path / "data")
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "config.yaml").write_text("task: next_item\n")
    job = torchrun(f"data.store={store}", f"run.dir={run_dir}", restarts=1, log=tmp_path / "log", ranks=1)
    assert job.wait(timeout=240) != 0
    text = (tmp_path / "log").read_text()
    assert text.count("holds a run already: set run.resume=true") == 3, "per attempt once, and in torchrun's summary"
    assert list(run_dir.iterdir()) and not list(run_dir.glob("checkpoints/*"))
