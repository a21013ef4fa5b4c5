"""What all kinds share: a folder for trials, and the undisturbed stores, runs and scores that trials copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from soak.processes import Processes, verb
from soak.trees import clear

STORE = ["data=files", "data.ingest.context_columns=[action]", "data.ingest.num_buckets=4",
         "data.ingest.row_group_events=60", "data.ingest.threads=1"]  # fmt: skip
CAUSAL = ["model.attention=causal", "model.chunk=4", "data.cuts=0", "data.columns=[action]"]
DAY_S = 86_400


class Lab:
    """Trials always run in `trial`: outputs that name their own path are equal from trial to trial."""

    def __init__(self, work: Path, processes: Processes) -> None:
        self.work, self.processes, self.trial = work, processes, work / "trial"
        self.events = work / "lab/events"
        self.events.mkdir(parents=True)

    @cached_property
    def days(self) -> list[Path]:
        """Events of day 0 and of day 1, which brings new users and items."""
        paths = [self.events / f"day-{day}.parquet" for day in range(2)]
        self.processes.must(lambda: [_write_day(path, day) for day, path in enumerate(paths)] and None)
        return paths

    @cached_property
    def store(self) -> Path:
        """A store of day 0, for those who only read it."""
        return self.make("store", self.create("store"))[0] / "store"

    @cached_property
    def run(self) -> Path:
        """A next-item run on it: checkpoints at steps 4 to 12."""
        from helpers import SMALL_TRAIN

        run = self.work / "lab/run/run"
        steps = ["optim.max_steps=12", "run.checkpoint_every=4", "run.keep_last=9"]
        self.processes.must(verb("train", *SMALL_TRAIN, *CAUSAL, *steps, f"data.store={self.store}", f"run.dir={run}"))
        return run

    @cached_property
    def ranking(self) -> Path:
        """A folder with a store that has impressions, the files it was made of, and a ranking run."""
        from test_ranking_task import RANKING

        root = self.work / "lab/ranking"
        self.processes.must(lambda: _ranking_store(root))
        steps = ["optim.max_steps=6", f"data.store={root}/store", f"run.dir={root}/run"]
        self.processes.must(verb("train", *RANKING, *steps))
        return root

    def create(self, name: str, *overrides: str) -> Callable[[], Any]:
        """Ingest of day 0 to trial/NAME."""
        return verb(
            "ingest", *STORE, f"data.ingest.input=[{self.days[0]}]", f"data.store={self.trial}/{name}", *overrides
        )

    def append(self, name: str) -> Callable[[], Any]:
        """Append of day 1 to trial/NAME."""
        where = [f"data.store={self.trial}/{name}", "data.ingest.mode=append", "data.ingest.threads=1"]
        return verb("ingest", "data=files", *where, f"data.ingest.input=[{self.days[1]}]")

    def make(self, name: str, *calls: Callable[[], Any]) -> tuple[Path, list[Any]]:
        """Run the calls one after another in an empty trial folder, and keep it. Returns it, and the last answers."""
        clear(self.trial)
        answers = [self.processes.must(call).answers for call in calls]
        kept = self.work / "lab" / name
        shutil.copytree(self.trial, kept)
        return kept, answers[-1]


def _write_day(path: Path, day: int) -> None:
    from feature_store_reference import random_events, write_events

    size = {"num_users": 60 + 20 * day, "num_items": 40 + 5 * day, "times": DAY_S}
    events = random_events(1200 if day == 0 else 150, seed=day, **size)
    shift = day * DAY_S
    write_events(path, [{**e, "timestamp": e["timestamp"] + shift, "liked": e["rating"] > 3} for e in events])


def _ranking_store(root: Path) -> None:
    import pyarrow.parquet as pq
    from ranking_data import make_ranking_store

    make_ranking_store(root, num_users=30)
    lists = pq.read_table(root / "impressions.parquet", columns=["user_id", "item_id", "timestamp", "device"])
    pq.write_table(lists, root / "lists.parquet", row_group_size=50)
