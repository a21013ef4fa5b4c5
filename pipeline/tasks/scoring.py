"""The one loop over the parts of a scoring. Ranks walk in lockstep, because tables are sharded and each step needs all
of them: part p goes to rank p modulo ranks, and a rank without a batch takes part with padding.

    todo      part 3         part 5         part 6         3 and 5 at once on two ranks, then 6 on rank 0
    rank 0    a b c |        d e | commit   ...
    rank 1    f g - | commit ...                           -: padding_step

A part's content does not depend on the number of ranks. A rerun skips the parts that are there and whole.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from elastic_rec.pipeline.config.score import ScoreConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.score_folder import ScoreFolder

ALL = 1 << 62  # more events than a history has

Item = TypeVar("Item")


class Part(ABC):
    """One part while it is made, by one rank. counts: complete at its commit."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """What is scored at a time, in order."""

    @abstractmethod
    def score(self, batch: Any) -> None:
        """Scores a batch and keeps the result. Collective, with the padding steps of other ranks."""

    @abstractmethod
    def commit(self, folder: ScoreFolder) -> None:
        """Writes the part. After it the part lasts."""


class Scoring(ABC):
    """A kind of scoring: its parts by number, and how one is made.

    settings: what the content of all parts depends on, JSON-able. manifest: entries of OUT/_manifest.json; "unit" names
    what a row is.
    """

    command: ClassVar[str]  # of score.py
    config_type: ClassVar[type[ScoreConfig]]
    numbers: list[int]
    manifest: dict[str, Any]

    def __init__(self, task: Any, model: nn.Module, *, step: int, fingerprint: str, config: Any) -> None:
        """fingerprint: of the model (run_folder.model_fingerprint). Raises ConfigError for what does not fit the run.
        Collective."""
        self.task, self.model, self.config, self.world = task, model, config, task.world
        self.fingerprint = fingerprint
        run = {"run": str(Path(config.run).resolve()), "step": step}
        self.settings = run | self.open() | {"model": fingerprint}

    @abstractmethod
    def open(self) -> dict[str, Any]:
        """Sets numbers and manifest. Returns the settings beside run, step and model. Collective."""

    @staticmethod
    @abstractmethod
    def run_config(run: TrainConfig, config: Any) -> TrainConfig:
        """The run's config with what this scoring reads of a history. Raises ConfigError where the run cannot."""

    def writing(self) -> AbstractContextManager:
        """Entered by all ranks while parts are written. Collective."""
        return nullcontext()

    def is_done(self, number: int, known: dict[str, Any]) -> bool:
        """Whether a whole part stays as it is. known: what is known of it, as ScoreFolder.whole has it."""
        return True

    @abstractmethod
    def part(self, number: int, known: dict[str, Any] | None) -> Part:
        """Begins to make a part. known: of the part that is there now, None where there is no whole one."""

    @abstractmethod
    def padding_step(self) -> None:
        """What a rank does without a batch while others score one. Collective."""

    @abstractmethod
    def figures(self, *, rows: dict[int, int], scored: list[int], counts: Counter[str], seconds: float) -> dict:
        """What score.py prints. rows: by part. scored: the parts made now. counts: of these, over all ranks."""


def score_parts(scoring: Scoring, *, out: Path, world: World) -> dict[str, Any]:
    """Scores into `out` what is not there yet. Collective. Returns figures."""
    began, numbers, counts = time.perf_counter(), scoring.numbers, Counter()
    with ScoreFolder(out, scoring.settings, world=world).writing(numbers) as folder, scoring.writing():
        known = folder.whole(numbers)
        todo = [number for number in numbers if number not in known or not scoring.is_done(number, known[number])]
        world.log(f"{len(todo)} parts to score, {len(numbers) - len(todo)} done before")
        if todo:
            folder.begin()
        for first in range(0, len(todo), world.size):
            mine = todo[first + world.rank] if first + world.rank < len(todo) else None
            part = None if mine is None else scoring.part(mine, known.get(mine))
            for batch in lockstep(iter(()) if part is None else part.batches(), world):
                if part is None or batch is None:
                    scoring.padding_step()
                else:
                    part.score(batch)
            if part is not None:
                part.commit(folder)
                counts += part.counts
        counts = sum(world.of_all(counts), Counter())
        rows = folder.close(numbers, **scoring.manifest)
    seconds = time.perf_counter() - began
    return {
        "out": str(out),
        **scoring.figures(rows=rows, scored=todo, counts=counts, seconds=seconds),
        "parts": len(numbers),
        "skipped_parts": len(numbers) - len(todo),
        "seconds": round(seconds, 2),
    }


def lockstep(items: Iterator[Item], world: World) -> Iterator[Item | None]:
    """This rank's items, then None until every rank has run out. Collective."""
    for number in count():
        world.pulse.beat(f"batch {number} of a part")
        item = next(items, None)
        someone = torch.tensor(int(item is not None), device=world.device)
        dist.all_reduce(someone, op=dist.ReduceOp.MAX)
        if not someone:
            return
        yield item
