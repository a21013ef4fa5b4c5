"""The files that flips.py damages, their readers, and what the readers answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from soak.flips import Reader, Target
from soak.jobs import score_full, score_incremental, score_ranking, scored_yesterday
from soak.lab import CAUSAL, STEADY, Lab
from soak.processes import verb
from soak.trees import figures, tree, weights


def checkpoint_targets(lab: Lab) -> list[Target]:
    """The newest checkpoint, which is the best one, too."""
    readers = [_verify(f"run={lab.trial}/run"), *_run_readers(lab)]
    return [Target(lab.run.parent, ["run/checkpoints/step-00000012/*"], readers)]


def run_targets(lab: Lab) -> list[Target]:
    """The settings of a run, and what it knows of its store."""
    return [Target(lab.run.parent, ["run/*.yaml", "run/*.json"], _run_readers(lab))]


def store_targets(patterns: list[str], *, with_score: bool = False) -> Callable[[Lab], list[Target]]:
    """A store, read by those that need no torch, and by scoring."""

    def make(lab: Lab) -> list[Target]:
        store, out = lab.trial / "store", lab.trial / "out"
        readers = [
            _verify(f"store={store}"),
            Reader("describe", verb("describe", f"store={store}", f"out={out}.html", then=partial(_page, out))),
            Reader("append", lab.append("store", then=partial(_hash, store))),
        ]
        if with_score:
            where = [f"run={lab.run}", f"store={store}", f"out={out}", "k=6"]
            readers.append(Reader("score", verb("score", *where, then=partial(_lists, out))))
        return [Target(lab.created, patterns, readers)]

    return make


def impression_targets(lab: Lab) -> list[Target]:
    """A store with impressions, read by a ranking run's evaluation, and by describe."""
    store = lab.trial / "store"
    out, metrics = lab.trial / "out", lab.trial / "run/metrics.json"
    readers = [
        _verify(f"store={store}"),
        Reader("evaluate", verb("evaluate", f"run={lab.trial}/run", then=partial(_json, metrics))),
        Reader("describe", verb("describe", f"store={store}", f"out={out}.html", then=partial(_page, out))),
    ]
    return [Target(lab.ranking, ["store/impressions/**/*"], readers)]


def state_targets(lab: Lab) -> list[Target]:
    """States of yesterday, continued today."""
    out = lab.trial / "out"
    readers = [
        _verify(f"store={lab.trial}/store"),
        Reader("score incremental", score_incremental(lab, then=partial(_lists, out))),
    ]
    return [Target(scored_yesterday(lab), ["store/states/**/*"], readers)]


def score_targets(lab: Lab) -> list[Target]:
    """Finished scores, asked for once more: in full, of candidates, and of states of yesterday."""
    out, kinds = lab.trial / "out", {"full": score_full, "ranking": score_ranking}
    pristine = {name: lab.made(f"scored-{name}", score(lab)) for name, score in kinds.items()}
    pristine["incremental"], kinds["incremental"] = scored_yesterday(lab), score_incremental
    return [
        Target(pristine[name], ["out/*"], [Reader(f"score {name} again", score(lab, then=partial(_lists, out)))])
        for name, score in kinds.items()
    ] + [Target(pristine["full"], ["out/*"], [_verify(f"scores={out}")])]


def _verify(what: str) -> Reader:
    return Reader("verify", verb("verify", what), must_notice=True)


def _run_readers(lab: Lab) -> list[Reader]:
    from helpers import SMALL_TRAIN

    run, out = lab.trial / "run", lab.trial / "out"
    more = [f"data.store={lab.store}", f"run.dir={run}", "run.resume=true", "optim.max_steps=16", "run.keep_last=9"]
    train = [*SMALL_TRAIN, *CAUSAL, *STEADY, *more]
    return [
        Reader("score", verb("score", f"run={run}", f"out={out}", "k=6", then=partial(_lists, out))),
        Reader("evaluate", verb("evaluate", f"run={run}", then=partial(_json, run / "metrics.json"))),
        Reader("train run.resume=true", verb("train", *train, then=partial(_trained, run))),
    ]


def _trained(run: Path) -> dict:
    return figures(run) | weights(run) | tree(run, "baselines.json")


def _lists(out: Path) -> dict[str, list]:
    """Part -> its rows, in order."""
    import pyarrow.parquet as pq

    return {part.name: pq.read_table(part).to_pylist() for part in sorted(out.glob("part-*.parquet"))}


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def _page(out: Path) -> str:
    return hashlib.sha256(out.with_suffix(".html").read_bytes()).hexdigest()


def _hash(store: Path) -> str:
    """It covers every file that the current version names."""
    return json.loads((store / "manifest.json").read_text())["hash"]
