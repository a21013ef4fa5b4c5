"""SIGTERM and Ctrl-C to real verbs: one line, exit code 75, nothing lost that was committed, and a rerun goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs_verbs import Job, Verbs, wait_until

STEPS, PER_EPOCH = 24, 8
ENDED = "interrupted by {}; what is committed stays: run the same command again"


@pytest.fixture(scope="module")
def verbs(tmp_path_factory):
    served = Verbs(tmp_path_factory.mktemp("verbs"))
    yield served
    served.close()


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> list[str]:
    store = helpers.make_store(tmp_path_factory.mktemp("data"))
    causal = ["model.tower=elastic_causal", "data.targets=every_event", "model.chunk=4"]
    fixed = ["data.columns=[action]", "optim.epochs=20", "run.keep_last=9", "optim.patience=0", *causal]
    return [*helpers.SMALL_TRAIN, f"data.store={store}", f"optim.max_steps={STEPS}", *fixed]


@pytest.fixture(scope="module")
def unbroken(verbs, train, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    verbs.good("train", *train, f"run.dir={run_dir}")
    return run_dir


def lines(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock, or is counted since the process began."""
    passing = ("samples_per_s", "events_per_s", "data_wait_share", "memory_share", "memory_effective")
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in passing} for line in found]


@pytest.mark.parametrize(
    ("kind", "beat", "nth", "step"),
    [
        (signal.SIGTERM, "step 12", 1, 11),  # before that step begins
        (signal.SIGINT, "batch 0 of valid", 1, PER_EPOCH),
        # All steps are done, the last validation is not.
        (signal.SIGTERM, "batch 0 of valid", STEPS // PER_EPOCH, STEPS),
    ],
)
def test_training_is_saved_and_goes_on_as_if_nothing_had_been(verbs, train, unbroken, tmp_path, kind, beat, nth, step):
    run_dir = tmp_path / "run"
    done = verbs.run("train", *train, f"run.dir={run_dir}", at=(beat, nth, kind))
    saved = f"at step {step}, which is saved: go on with the same command and run.resume=true"
    assert done.code == 75 and not done.out and done.last == f"interrupted by {kind.name} {saved}", done.err
    assert "Traceback" not in done.err and (run_dir / f"checkpoints/step-{step:08d}/complete.json").exists()

    again = verbs.run("train", *train, f"run.dir={run_dir}", "run.resume=true")
    assert f"resuming at step {step}" in again.err
    assert lines(run_dir) == lines(unbroken)
    figures = json.loads(again.out.splitlines()[-1])
    assert (
        figures["steps"] == STEPS
        and figures["best_step"]
        == max((line for line in lines(unbroken) if line["kind"] == "valid"), key=lambda line: line["ndcg@10"])["step"]
    )


@pytest.mark.parametrize(
    ("verb", "arguments", "beat"),
    [
        ("evaluate", [], ("batch 0 of test", 1)),
        ("score", ["out={}/scores"], ("batch 1 of a part", 3)),
        ("score incremental", ["out={}/states"], ("batch 1 of a part", 3)),
    ],
)
def test_evaluate_and_score_end_and_a_rerun_goes_on(verbs, unbroken, tmp_path, verb, arguments, beat):
    verb, *command = verb.split()
    arguments = [*command, f"run={unbroken}", *(argument.format(tmp_path) for argument in arguments)]
    done = verbs.run(verb, *arguments, at=(*beat, signal.SIGINT))
    assert done.code == 75 and done.last == ENDED.format("SIGINT") and "Traceback" not in done.err
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    figures = verbs.good(verb, *arguments)
    assert figures["users"] == 120 and figures.get("skipped_parts", 2) == 2


@pytest.fixture(scope="module")
def many_events(tmp_path_factory) -> Path:
    """Enough of them that ingest takes seconds."""
    rng, n = np.random.default_rng(0), 1_500_000
    columns = {"user_id": rng.integers(0, 90_000, n), "item_id": rng.integers(0, 9_000, n)}
    path = tmp_path_factory.mktemp("events") / "events.parquet"
    pq.write_table(pa.table({**columns, "timestamp": rng.integers(10**9, 17 * 10**8, n)}), path)
    return path


@pytest.mark.parametrize("mode", ["create", "append", "spark"])
def test_ingest_ends_and_leaves_nothing(verbs, many_events, tmp_path, mode):
    ingest = ["ingest", "data=files", f"data.ingest.input=[{many_events}]", f"data.store={tmp_path}/store"]
    if mode == "append":
        few = tmp_path / "few.parquet"
        pq.write_table(pq.read_table(many_events).slice(0, 1000), few)
        verbs.good("ingest", "data=files", f"data.ingest.input=[{few}]", f"data.store={tmp_path}/store")
        ingest = ["ingest", "append", f"input=[{many_events}]", f"store={tmp_path}/store"]
    elif mode == "spark":
        pytest.importorskip("pyspark")
        ingest += ["data.ingest.engine=spark", "data.ingest.spark_master='local[1]'"]
    before = {path: path.stat().st_size for path in tmp_path.rglob("*")}
    job = verbs.start(*ingest)
    done = job.signal(signal.SIGTERM, after=lambda: is_at_work(job, tmp_path, mode))
    assert done.code == 75 and done.last == ENDED.format("SIGTERM"), done.err
    assert "Traceback" not in done.err
    assert {path: path.stat().st_size for path in tmp_path.rglob("*")} == before
    if mode == "create":
        assert verbs.good(*ingest)["events"] == 1_500_000
    elif mode == "spark":
        wait_until(lambda: not [pid for pid in processes_writing_to(job.log) if pid != job.pid])


def processes_writing_to(log: Path) -> list[int]:
    found = []
    for stdout in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # it has ended meanwhile
            if stdout.readlink() == log.with_suffix(".out"):
                found.append(int(stdout.parts[2]))
    return found


def is_at_work(job: Job, folder: Path, mode: str) -> bool:
    """DuckDB has begun to write; a JVM has begun to start."""
    if mode == "spark":
        return len(processes_writing_to(job.log)) > 1
    return any(folder.rglob("staged.duckdb.wal"))


def test_describe_ends_with_one_line(verbs, train, tmp_path):
    store = train[len(helpers.SMALL_TRAIN)].split("=")[1]
    job = verbs.start("describe", f"store={store}", f"out={tmp_path}/page.html")
    done = job.signal(signal.SIGINT, after=lambda: listens(job))
    assert (done.code, done.err.strip()) == (75, ENDED.format("SIGINT")) and not list(tmp_path.iterdir())


def listens(job: Job) -> bool:
    caught = next(line for line in Path(f"/proc/{job.pid}/status").read_text().splitlines() if line[:6] == "SigCgt")
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


STUCK = """
import ctypes, sys
from elastic_rec.pipeline.runtime import interrupts
interrupts.listen()
interrupts.GRACE_S = 1.5
mutex = ctypes.create_string_buffer(64)
with interrupts.deferred() if sys.argv[1] == "deferred" else open("/dev/null"):
    while True:
        try:
            print("ready", flush=True)  # here: the signal may come at once
            ctypes.CDLL(None).pthread_mutex_lock(mutex)  # never comes back the second time, and no signal wakes it
        except interrupts.Interrupted:
            pass  # as in a __del__
"""


@pytest.mark.parametrize("how", ["raising", "deferred"])
def test_a_main_thread_stuck_in_foreign_code_is_ended(how):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # timeout(1) and Slurm send one wish twice: that is no second signal
    if how == "deferred":
        time.sleep(2)
        assert process.poll() is None, "the caller was to end by itself"
        process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    ends = {"raising": "still busy after 2 s, ended", "deferred": "interrupted by a second SIGINT: ended at once"}
    assert process.returncode == 75 and text.strip().endswith(ends[how]) and text.count("\n") == 1


def test_nohup_is_respected():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from elastic_rec.pipeline.runtime import interrupts; interrupts.listen()\n"
        "import os; os.kill(os.getpid(), signal.SIGINT); print('goes on')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "goes on\n"
