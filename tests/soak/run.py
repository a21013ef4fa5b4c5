"""Inject faults for some minutes, and print what was survived.

python tests/soak/run.py --minutes 5
python tests/soak/run.py --kinds flips --trials 200 --minutes 60
python tests/soak/run.py --kinds flips-data --first 17 --trials 1 --keep      (one trial again)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

# ruff: noqa: E402
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "support")]
sys.dont_write_bytecode = True  # children would differ in what they write
os.environ["OMP_NUM_THREADS"] = "1"

from soak.flips import Flips
from soak.full_disk import FullDisk
from soak.jobs import score_jobs, store_jobs, train_jobs
from soak.kills import Kills
from soak.kinds import Kind, Result, Tally, figures, table
from soak.lab import Lab
from soak.power_cuts import PowerCuts
from soak.processes import OutOfTime, Processes
from soak.targets import (
    checkpoint_targets,
    impression_targets,
    run_targets,
    score_targets,
    state_targets,
    store_targets,
)

GRACE_S = 60  # for the trial under way when the time is over


def kinds(lab: Lab) -> list[Kind]:
    return [
        Kills("kill-stores", lab, store_jobs, signal=signal.SIGKILL, per_turn=12),
        Kills("kill-scores", lab, score_jobs, signal=signal.SIGKILL, per_turn=6),
        Kills("kill-train", lab, train_jobs, signal=signal.SIGKILL),
        Kills("terminate-train", lab, train_jobs, signal=signal.SIGTERM),
        FullDisk(lab, [store_jobs, score_jobs, train_jobs]),
        PowerCuts(lab, [store_jobs, score_jobs, partial(train_jobs, ranks=1)]),
        Flips("flip-store-manifest", lab, store_targets(["store/manifest*.json"])),
        Flips("flip-vocabularies", lab, store_targets(["store/vocab/*"], with_score=True)),
        Flips("flip-histories", lab, store_targets(["store/bucket=*/*"], with_score=True)),
        Flips("flip-impressions", lab, impression_targets),
        Flips("flip-checkpoints", lab, checkpoint_targets),
        Flips("flip-run", lab, run_targets),
        Flips("flip-states", lab, state_targets),
        Flips("flip-scores", lab, score_targets),
    ]


def main() -> int:
    options = _options()
    began, work = time.monotonic(), Path(tempfile.mkdtemp(prefix="soak-"))
    end = began + options.minutes * 60
    lab = Lab(work, Processes(work, end=end + GRACE_S))
    chosen = [kind for kind in kinds(lab) if kind.name.startswith(tuple(options.kinds.split(",")))]
    tallies = {kind.name: Tally() for kind in chosen}
    try:
        soak(chosen, tallies, options, end=end)
    except OutOfTime:
        print("the trial under way was cut", file=sys.stderr)
    finally:
        print(f"work folder: {work}" if options.keep else "", file=sys.stderr)
        if not options.keep:
            shutil.rmtree(work)
    print(table(tallies))
    is_good = not any(tally.results[result] for tally in tallies.values() for result in (Result.lost, Result.silent))
    print(json.dumps({"good": is_good, "seconds": round(time.monotonic() - began), "kinds": figures(tallies)}))
    return 0 if is_good else 1


def soak(chosen: list[Kind], tallies: dict[str, Tally], options: argparse.Namespace, *, end: float) -> None:
    """Round-robin, some trials of each kind at a time, until the time is over or each kind has had its trials."""
    left = list(chosen)
    while left:
        for kind in list(left):
            for _ in range(kind.per_turn):
                tally = tallies[kind.name]
                if time.monotonic() > end:
                    return
                if tally.tried == options.trials:
                    left.remove(kind)
                    break
                number, began = options.first + tally.tried, time.monotonic()
                outcome = kind.trial(number, random.Random(f"{options.seed}/{kind.name}/{number}"))
                tally.add(outcome, time.monotonic() - began)
                is_bad = outcome.result is not Result.survived
                if is_bad or options.keep:
                    said = f"\n{outcome.text[-2000:]}" if is_bad or outcome.rank > 1 else ""
                    print(
                        f"{kind.name} {number}: {outcome.result.name}, {outcome.how}: {outcome.what}{said}",
                        file=sys.stderr,
                    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5, help="of all together, building included")
    parser.add_argument("--seed", type=int, default=0, help="of files, bits and moments")
    parser.add_argument("--kinds", default="", help="those whose name begins like one of these, separated by commas")
    parser.add_argument("--trials", type=int, default=-1, help="at most so many of each kind; -1: no limit")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial: repeats one that went wrong")
    parser.add_argument("--keep", action="store_true", help="keep the work folder, and tell every trial")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
