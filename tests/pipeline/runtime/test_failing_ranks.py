"""Two real ranks, one of which fails, is killed, stopped or stuck: one line says which and why, and both end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import helpers
import jobs_ranks
import pytest

WAYS = ("none", "mistake", "same mistake", "bug", "disk", "SIGKILL", "SIGSTOP", "SIGTERM", "sleep")
SCRIPT = Path(jobs_ranks.__file__)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, tuple[list[int], str, str]]:
    """way -> (exit codes, stderr of rank 0, of rank 1)."""
    folder = tmp_path_factory.mktemp("logs")
    command = [sys.executable, str(SCRIPT), str(folder), *WAYS]
    done = subprocess.run(command, capture_output=True, text=True, env=helpers.environment(), timeout=300, check=True)
    logs = {way: [(folder / f"{way}-{rank}").read_text() for rank in range(2)] for way in WAYS}
    return {way: (codes, *logs[way]) for way, codes in json.loads(done.stdout).items()}


def test_a_job_that_ends_well_says_nothing_of_it(jobs):
    assert jobs["none"] == ([0, 0], "{'steps': 8}\n", "")


def test_the_rank_that_fails_says_why_and_the_other_is_silent(jobs):
    assert jobs["mistake"] == ([2, 2], "", "error [rank 1]: k=0: set it to 1 or more\n")
    codes, other, failed = jobs["disk"]
    assert codes == [2, 2] and not other
    assert failed.startswith("error [rank 1]: ") and "No space left on device" in failed and failed.count("\n") == 1
    codes, other, failed = jobs["bug"]
    assert codes == [1, 1] and not other and failed.count("KeyError: 'a fault of the program'") == 1


def test_a_mistake_of_all_ranks_is_told_once(jobs):
    codes, *texts = jobs["same mistake"]
    assert codes == [2, 2]
    assert re.fullmatch(r"error \[rank \d\]: k=0: set it to 1 or more\n", "".join(texts))


def test_a_signal_to_one_rank_ends_the_other(jobs):
    codes, other, ended = jobs["SIGTERM"]
    assert codes == [75, 75] and not other and ended.startswith("interrupted by SIGTERM") and ended.count("\n") == 1


def test_a_killed_rank_is_named_by_the_other(jobs):
    codes, text, _ = jobs["SIGKILL"]
    assert codes == [4, -9] and text.count("\n") == 1
    assert text.startswith("error [rank 0]: rank 1 ended without a word") and "this rank stood at step 3" in text


@pytest.mark.parametrize(
    ("way", "state"),
    [("SIGSTOP", r"no sign of life for \d+ s"), ("sleep", r"at tests/support/jobs_ranks.py:\d+ in fail")],
)
def test_a_rank_that_hangs_is_named_with_the_step(jobs, way, state):
    codes, text, _ = jobs[way]
    assert codes == [4, -9] and text.count("\n") == 1
    assert re.match(
        rf"error \[rank 0\]: rank 1 has not arrived \(last seen at .+, {state}\); the others have waited for \d+ s "
        r"at step 3\.", text
    ), text  # fmt: skip
    waited_s = int(re.search(r"waited for (\d+) s", text)[1])
    assert jobs_ranks.TIMEOUT_S <= waited_s < 5 * jobs_ranks.TIMEOUT_S and "parallel.timeout_s" in text
