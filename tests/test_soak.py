"""tests/soak/run.py itself: a few trials of its cheap kinds. `make soak MINUTES=30` runs them all."""

import json
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import REPO
from soak.flips import Flips, Reader, Target
from soak.jobs import Job
from soak.kills import Kills
from soak.kinds import Result
from soak.processes import Processes


def soak(*options: str) -> tuple[int, str, dict]:
    command = [sys.executable, str(REPO / "tests/soak/run.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    return done.returncode, done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_kills_and_flips_of_a_store_are_survived():
    code, text, told = soak("--kinds", "kill-stores,flip-store-manifest", "--trials", "3", "--minutes", "9")
    assert code == 0 and told["good"] and told["kinds"].keys() == {"kill-stores", "flip-store-manifest"}
    for name, counts in told["kinds"].items():
        assert (counts["tried"], counts["survived"], counts["silent"], counts["lost"]) == (3, 3, 0, 0), text
        assert f"| {name} | 3 | 3 | 0 | 0 |" in text
    assert told["kinds"]["kill-stores"]["how"].keys() <= {"killed", "finished before"}
    assert sum(count for how, count in told["kinds"]["flip-store-manifest"]["how"].items() if "refused" in how) == 3


def test_the_time_is_kept():
    code, _, told = soak("--minutes", "0")
    assert code == 0 and told["seconds"] < 30 and all(counts["tried"] == 0 for counts in told["kinds"].values())


@pytest.fixture
def lab(tmp_path) -> SimpleNamespace:
    (tmp_path / "pristine").mkdir()
    (tmp_path / "pristine/file").write_text("content")
    processes = Processes(tmp_path, end=time.monotonic() + 300)
    return SimpleNamespace(work=tmp_path, trial=tmp_path / "trial", pristine=tmp_path / "pristine", processes=processes)


def test_a_reader_that_does_not_look_is_silent(lab):
    def trusting() -> str:
        return (lab.trial / "file").read_bytes().hex()

    def checking() -> str:
        assert trusting() == b"content".hex(), "file is damaged"
        return trusting()

    for reader, result, how in (
        (Reader("trusting", trusting), Result.silent, "another answer"),
        (Reader("deaf", lambda: None, must_notice=True), Result.silent, "not noticed"),
        (Reader("indifferent", lambda: None), Result.survived, "harmless"),
        (Reader("checking", checking), Result.survived, "refused: traceback"),
    ):
        target = Target(lab.pristine, ["*"], [reader])
        outcome = Flips("flip", lab, lambda lab, target=target: [target]).trial(0, random.Random(0))
        assert (outcome.result, outcome.how) == (result, how) and "bit" in outcome.what, outcome


def test_a_job_that_takes_half_a_file_for_a_whole_one_is_silent(lab):
    def careless() -> None:
        if not (lab.trial / "new").exists():
            with (lab.trial / "new").open("w") as file:
                (lab.trial / "mark").mkdir()
                file.write("all of it")

    job = Job("careless", [careless], [careless])
    kills = Kills("kill", lab, lambda lab: [job], signal=signal.SIGKILL)
    outcomes = [kills.trial(0, random.Random(number)) for number in range(8)]
    assert Result.silent in {outcome.result for outcome in outcomes}, outcomes
    assert {outcome.how for outcome in outcomes} <= {"killed", "finished before", "killed, another result"}
