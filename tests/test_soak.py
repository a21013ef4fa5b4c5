"""tests/soak/run.py itself: a few trials of its cheap kinds. `make soak MINUTES=30` runs them all."""

import json
import subprocess
import sys

from helpers import REPO


def soak(*options: str) -> tuple[int, str, dict]:
    command = [sys.executable, str(REPO / "tests/soak/run.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    return done.returncode, done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_kills_full_disks_and_flips_of_a_store_are_survived():
    code, text, told = soak("--kinds", "kill-stores,flip-store-manifest", "--trials", "4", "--minutes", "9")
    assert code == 0 and told["good"] and told["kinds"].keys() == {"kill-stores", "flip-store-manifest"}
    for name, counts in told["kinds"].items():
        assert (counts["tried"], counts["survived"], counts["silent"], counts["lost"]) == (4, 4, 0, 0), text
        assert f"| {name} | 4 | 4 | 0 | 0 |" in text
    assert told["kinds"]["kill-stores"]["how"].keys() <= {"killed", "finished before"}
    assert sum(count for how, count in told["kinds"]["flip-store-manifest"]["how"].items() if "refused" in how) == 4


def test_the_time_is_kept():
    code, _, told = soak("--minutes", "0")
    assert code == 0 and told["seconds"] < 30 and all(counts["tried"] == 0 for counts in told["kinds"].values())
