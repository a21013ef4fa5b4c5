"""The files that flips.py damages, who reads them, and what the readers answer."""

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
from soak.trees import losses, weights


def run_targets(patterns: list[str]) -> Callable[[Lab], list[Target]]:
    """A run folder, read by scoring, by evaluation, and by training that goes on."""
    return lambda lab: [Target(lab.run.parent, patterns, _run_readers(lab))]


def store_targets(patterns: list[str], *, with_score: bool = False) -> Callable[[Lab], list[Target]]:
    """A store, read by those that need no torch, and by scoring."""

    def make(lab: Lab) -> list[Target]:
        store, out = lab.trial / "store", lab.trial / "out"
        readers = [
            Reader("verify", partial(_verify, store), must_notice=True),
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
        Reader("evaluate", verb("evaluate", f"run={lab.trial}/run", then=partial(_figures, metrics))),
        Reader("describe", verb("describe", f"store={store}", f"out={out}.html", then=partial(_page, out))),
    ]
    return [Target(lab.ranking, ["store/impressions/**/*"], readers)]


def state_targets(lab: Lab) -> list[Target]:
    """States of yesterday, continued today."""
    out = lab.trial / "out"
    reader = Reader("score mode=incremental", score_incremental(lab, then=partial(_lists, out)))
    return [Target(scored_yesterday(lab), ["store/states/**/*"], [reader])]


def score_targets(lab: Lab) -> list[Target]:
    """Finished scores, asked for once more: in full, of candidates, and of states of yesterday."""
    patterns, out = ["out/*"], partial(_lists, lab.trial / "out")
    jobs = [("full", score_full), ("ranking", score_ranking)]
    made = [(name, lab.made(f"scored-{name}", job(lab)), job(lab, then=out)) for name, job in jobs]
    made.append(("incremental", scored_yesterday(lab), score_incremental(lab, then=out)))
    return [Target(kept, patterns, [Reader(f"score {name} again", call)]) for name, kept, call in made]


def _run_readers(lab: Lab) -> list[Reader]:
    from helpers import SMALL_TRAIN

    run, out = lab.trial / "run", lab.trial / "out"
    more = [f"data.store={lab.store}", f"run.dir={run}", "run.resume=true", "optim.max_steps=16", "run.keep_last=9"]
    train = verb("train", *SMALL_TRAIN, *CAUSAL, *STEADY, *more, then=lambda: losses(run) | weights(run))
    return [
        Reader("score", verb("score", f"run={run}", f"out={out}", "k=6", then=partial(_lists, out))),
        Reader("evaluate", verb("evaluate", f"run={run}", then=partial(_figures, run / "metrics.json"))),
        Reader("train run.resume=true", train),
    ]


def _verify(store: Path) -> None:
    from elastic_rec.feature_store.store import Store

    Store.open(store).verify()


def _lists(out: Path) -> dict[str, str]:
    """Part -> digest of its rows, in order, to the last bit of a score."""
    import pyarrow.parquet as pq

    parts = sorted(out.glob("part-*.parquet"))
    return {part.name: _sha256(repr(pq.read_table(part).to_pylist())) for part in parts}


def _figures(path: Path) -> dict:
    return json.loads(path.read_text())


def _page(out: Path) -> str:
    return _sha256(out.with_suffix(".html").read_text())


def _hash(store: Path) -> str:
    """It covers every file that the current generation names."""
    return json.loads((store / "manifest.json").read_text())["hash"]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
