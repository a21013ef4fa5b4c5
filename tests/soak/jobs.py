"""The jobs that write, what each must have written in the end, and what a reader may find in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from soak.lab import CAUSAL, Lab
from soak.processes import Call, verb
from soak.trees import Tree, figures, fresh, sizes, tree, weights

Calls = list[Call]


def store_is_whole(now: Tree, before: Tree, want: Tree) -> bool:
    """The store that its manifest names is all there, the one before or the new one; with impressions likewise."""
    return all(
        name not in before
        if name not in now
        else any(t.get(name) == now[name] and t.items() <= now.items() for t in (before, want))
        for name in ("store/manifest.json", "store/impressions/manifest.json")
    )


def parts_are_whole(now: Tree, before: Tree, want: Tree) -> bool:
    """Every part that can be seen is the one before or the new one."""
    parts = {path for path in now if path.startswith("out/part-")}
    return all(now[path] in (before.get(path), want[path]) for path in parts)


def store_result(trial: Path) -> dict[str, Any]:
    """Every byte, but for the number of the version: a kill between an append's manifest and its becoming current
    leaves a version that no one reads, and the rerun makes the one after it. The next vacuum deletes it."""
    path = trial / "store/manifest.json"
    manifest = json.loads(path.read_bytes()) if path.exists() else {}
    entries = manifest.get("source", {}).get("files", [])
    for entry, names in [(manifest, ("generation", "hash")), *((entry, ("generation",)) for entry in entries)]:
        for name in names:
            entry.pop(name, None)
    files = {name: digest for name, digest in tree(trial).items() if not name.startswith("store/manifest")}
    return {"manifest": manifest, **files}


@dataclass(frozen=True)
class Job:
    """A verb in the trial folder. pristine: what is there before. start: a call per rank; again: of the rerun.

    result: what must be equal in the end. is_whole(now, before, want): what a reader may meet after a kill.
    done: what a rerun says if it finds the work done and refuses to do it twice.
    """

    name: str
    start: Calls
    again: Calls
    result: Callable[[Path], dict[str, Any]] = tree
    is_whole: Callable[[Tree, Tree, Tree], bool] = lambda now, before, want: True
    pristine: Callable[[], Path] = lambda: None
    done: str = "nothing of the kind"


@dataclass(frozen=True)
class Reference:
    """The undisturbed job: the folder before and after it, its result, how long it took, changes of each rank, the
    bytes it added, its largest file."""

    before: Tree
    after: Tree
    want: dict[str, Any]
    seconds: float
    changes: list[int]
    grown_bytes: int
    largest_bytes: int


class Jobs:
    """The jobs of one kind, and their references, each made when it is first needed."""

    def __init__(self, lab: Lab, make: Callable[[Lab], list[Job]]) -> None:
        self.lab, self._make, self._jobs, self._references = lab, make, [], {}

    def draw(self, number: int) -> tuple[Job, Reference]:
        """They take turns."""
        self._jobs = self._jobs or self._make(self.lab)
        job, trial = self._jobs[number % len(self._jobs)], self.lab.trial
        if job.name not in self._references:
            fresh(trial, job.pristine())
            before, had = tree(trial), sizes(trial)
            ended, has = self.lab.processes.must(*job.start), sizes(trial)
            self._references[job.name] = Reference(
                before=before,
                after=tree(trial),
                want=job.result(trial),
                seconds=ended.seconds,
                changes=ended.changes,
                grown_bytes=sum(has) - sum(had),
                largest_bytes=max(has),
            )
        return job, self._references[job.name]


def store_jobs(lab: Lab) -> list[Job]:
    def created() -> Path:
        return lab.created

    def appended() -> Path:
        return lab.made("appended", lab.create("store"), lab.append("store"))

    def shown() -> Path:
        return lab.made("shown", lab.create("store"), _impressions(lab, "[action]"))

    vacuum = verb("ingest", "vacuum", f"store={lab.trial}/store", "retention_hours=0")
    overwrite = lab.create("store", "data.ingest.overwrite=true", "data.ingest.num_buckets=3")
    taken = "the same bytes were taken before"
    calls = [
        ("create", Job.pristine, lab.create("store"), "a store is there already"),
        ("append", created, lab.append("store"), taken),
        ("overwrite", created, overwrite, ""),
        ("impressions", created, _impressions(lab, "[action]"), ""),
        ("impressions replaced", shown, _impressions(lab, "[]"), ""),
        ("vacuum", appended, vacuum, ""),
    ]
    return [
        Job(name, [call], [call], store_result, store_is_whole, pristine, done or Job.done)
        for name, pristine, call, done in calls
    ]


def score_jobs(lab: Lab) -> list[Job]:
    full, incremental, ranking = score_full(lab), score_incremental(lab), score_ranking(lab)
    return [
        Job("score full", [full], [full], tree, parts_are_whole),
        Job("score incremental", [incremental], [incremental], tree, parts_are_whole, partial(scored_yesterday, lab)),
        Job("score ranking", [ranking], [ranking], tree, parts_are_whole),
    ]


def train_jobs(lab: Lab, *, ranks: int = 2) -> list[Job]:
    from helpers import SMALL_TRAIN

    steps = ["optim.max_steps=24", "optim.epochs=20", "run.checkpoint_every=5", "run.keep_last=3"]
    where = [f"data.store={lab.store}", f"run.dir={lab.trial}/run"]
    start, again = (
        [verb("train", *SMALL_TRAIN, *CAUSAL, *steps, *where, *more)] * ranks for more in ([], ["run.resume=true"])
    )
    name = f"train, {ranks} rank{'s' * (ranks > 1)}"
    return [Job(name, start, again, lambda trial: figures(trial / "run") | weights(trial / "run"))]


def score_full(lab: Lab, then: Call | None = None) -> Call:
    return verb("score", *_settings(lab.run, lab.trial), f"store={lab.store}", then=then)


def score_incremental(lab: Lab, then: Call | None = None) -> Call:
    where = [*_settings(lab.run, lab.trial), f"store={lab.trial}/store"]
    return verb("score", "incremental", *where, then=then)


def score_ranking(lab: Lab, then: Call | None = None) -> Call:
    where = [f"store={lab.ranking}/store", f"candidates={lab.ranking}/lists.parquet", "part_rows=40"]
    return verb("score", "ranking", *_settings(lab.ranking / "run", lab.trial), *where, then=then)


def scored_yesterday(lab: Lab) -> Path:
    """A store with day 1 appended, states and parts of day 0."""
    return lab.made("yesterday", lab.create("store"), score_incremental(lab), lab.append("store"))


def _settings(run: Path, trial: Path) -> list[str]:
    return [f"run={run}", f"out={trial}/out", "checkpoint=last", "k=6", "batch_size=16"]


def _impressions(lab: Lab, context: str) -> Call:
    """The events themselves, taken for impressions of one candidate, rated."""
    where = ["impressions", f"data.store={lab.trial}/store", "data.ingest.threads=1"]
    log = [f"data.impressions.input=[{lab.days[0]}]", "data.impressions.label_columns=[liked]"]
    return verb("ingest", *where, *log, f"data.impressions.context_columns={context}")
