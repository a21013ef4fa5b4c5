"""What all kinds share: a folder for trials, and the undisturbed stores, runs and scores that trials copy."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path

from soak.processes import Call, Processes, verb
from soak.trees import clear

STORE = ["data=files", "data.ingest.context_columns=[action]", "data.ingest.num_buckets=4",
         "data.ingest.row_group_events=60", "data.ingest.threads=1"]  # fmt: skip
CAUSAL = ["model.tower=elastic_causal", "model.chunk=4", "data.targets=every_event", "data.columns=[action]"]
STEADY = ["optim.final_lr_ratio=1", "run.checkpoint_every=4"]  # no schedule: more steps change no step before
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
    def created(self) -> Path:
        """A folder with a store of day 0."""
        return self.made("created", self.create("store"))

    @property
    def store(self) -> Path:
        """The store in it, for trials that only read it."""
        return self.created / "store"

    @cached_property
    def run(self) -> Path:
        """A next-item run on the store: checkpoints at steps 4 to 12."""
        from helpers import SMALL_TRAIN

        run = self.work / "lab/run/run"
        steps = ["optim.max_steps=12", "run.keep_last=9", f"data.store={self.store}", f"run.dir={run}"]
        self.processes.must(verb("train", *SMALL_TRAIN, *CAUSAL, *STEADY, *steps))
        return run

    @cached_property
    def ranking(self) -> Path:
        """A folder with a store that has impressions, a ranking run on it, and lists of candidates."""
        from ranking_data import RANKING

        train = verb(
            "train", *RANKING, "optim.max_steps=6", f"data.store={self.trial}/store", f"run.dir={self.trial}/run"
        )
        return self.made("ranking", lambda: _ranking_store(self.trial), train)

    def create(self, name: str, *overrides: str) -> Call:
        """Ingest of day 0 to trial/NAME."""
        where = [f"data.ingest.input=[{self.days[0]}]", f"data.store={self.trial}/{name}"]
        return verb("ingest", *STORE, *where, *overrides)

    def append(self, name: str, then: Call | None = None) -> Call:
        """Append of day 1 to trial/NAME."""
        return verb("ingest", "append", f"store={self.trial}/{name}", "threads=1", f"input=[{self.days[1]}]", then=then)

    def made(self, name: str, *calls: Call) -> Path:
        """What the calls leave in an empty trial folder, one after another; kept under a name, and made once."""
        kept = self.work / "lab" / name
        if not kept.exists():
            clear(self.trial)
            for call in calls:
                self.processes.must(call)
            shutil.copytree(self.trial, kept)
        return kept


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
