"""What comes after every disturbance: the folder is looked at, the job is run again, its result is compared."""

from __future__ import annotations

from soak.jobs import Job, Reference
from soak.kinds import Outcome, Result
from soak.lab import Lab
from soak.processes import Ended
from soak.trees import tree


def recover(lab: Lab, job: Job, reference: Reference, *, how: str, what: str, text: str = "", rank: int = 0) -> Outcome:
    """how, text: of the disturbed job. rank: how bad that was; among equals the longest rerun is the worst."""
    if not job.is_whole(now := tree(lab.trial), reference.before, reference.after):
        return Outcome(Result.silent, f"{how}, torn in between", what, text="\n".join([text, *now]))
    rerun = lab.processes.run(*job.again)
    what = f"{what}; rerun took {rerun.seconds:.1f} s"
    if not is_through(job, rerun):
        return Outcome(Result.lost, f"{how}, rerun: {rerun.failure}", what, text=rerun.text)
    if (result := job.result(lab.trial)) != reference.want:
        return Outcome(Result.silent, f"{how}, another result", what, text=difference(result, reference.want))
    return Outcome(Result.survived, how, what, rank=rank * 1000 + rerun.seconds, text=text)


def is_through(job: Job, ended: Ended) -> bool:
    return ended.is_good or job.done in ended.text


def difference(found: dict, want: dict, path: str = "") -> str:
    """A line for each value that differs."""
    lines = []
    for key in [key for key in sorted({*found, *want}) if found.get(key) != want.get(key)]:
        a, b = found.get(key), want.get(key)
        both = isinstance(a, dict) and isinstance(b, dict)
        lines.append(difference(a, b, f"{path}{key}/") if both else f"{path}{key}: {a}, undisturbed {b}")
    return "\n".join(lines)
