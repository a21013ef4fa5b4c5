"""A task: what a run learns, from which batches, and how it is measured and served. The verbs ask a Task only.

    train.py       prepare, train_reader, build_model, train_batches, validation
    evaluate.py    require_evaluable, evaluate
    score.py       scorings (scoring.py)

A new task is a subclass, a TaskName (config/train.py) and an entry of registry.TASKS.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from elastic_rec.feature_store.batches.examples import NUM_GAP_BUCKETS
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.reading.cursor import Cursor
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.vocabulary import UNKNOWN, Vocabulary
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.models.retrieval.model import EventTable
from elastic_rec.models.towers.config import Time
from elastic_rec.pipeline.config.data import DataConfig
from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.sharding import init_device
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.denominator import over_ranks
from elastic_rec.pipeline.tasks.scoring import Scoring


class Reader(Protocol):
    """What training needs of a reader: its batches in an epoch, over all ranks, and where it stands."""

    num_batches: int

    def cursor(self, epoch: int, batches: int) -> Cursor:
        """The place after so many batches of an epoch."""


class Batch(Protocol):
    """What the training loop needs of a batch. R rows; rows: (R,) int64, the user's row in the store, -1: padding."""

    rows: torch.Tensor
    weights: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    normaliser: torch.Tensor
    is_last_window: bool


class Validation(ABC):
    """What a run is judged by after each epoch. Both methods are collective."""

    @abstractmethod
    def figures(self, model: nn.Module) -> dict[str, Any]:
        """The model's figures on validation targets; the task's metric is left out where it is undefined."""

    def verdict(self, best: float | None) -> dict[str, Any]:
        """What train.py reports beside its best figure."""
        return {}


class Task(ABC):
    """One run's task, on the run's store or on another with its ids. All ranks make it alike."""

    metric: ClassVar[str]  # chooses the best checkpoint; the greater the better
    evaluate_keys: ClassVar[tuple[str, ...]] = ()  # keys of EvaluateConfig that mean something to this task alone
    scorings: ClassVar[tuple[type[Scoring], ...]]

    def __init__(
        self, config: TrainConfig, *, world: World, store: str = "", rows: dict[str, int] | None = None
    ) -> None:
        """Opens the store. Raises DataError where there is none.

        store: another than the config's, in its newest version. rows: rows of each embedding table of a trained
        run, {"item": 1500, "action": 4}; the store may have more ids by now, which count as unknown.
        """
        self.config, self.world = config, world
        # A run's version says nothing about another store.
        self.store = Store.open(store) if store else Store.open(config.data.store, version=config.data.version)
        self.columns = ["item", *config.data.columns]
        self.rows = rows or {name: self.store.vocabulary(name).size for name in self.columns}

    @property
    def store_hash(self) -> str:
        """Of all that is read; equal where two ranks have opened the same."""
        return self.store.manifest.hash

    def vocabulary(self, name: str) -> Vocabulary:
        """The ids of a column that has an embedding table."""
        return self.store.vocabulary(name)

    def user_ids(self, rows: torch.Tensor) -> list:
        """The users of these rows of the store, (R,) int64, each once; without padding, -1."""
        return self.store.user_ids(rows[rows >= 0].unique().numpy()).to_pylist()

    def prepare(self) -> None:  # noqa: B027 (a task may have nothing to do)
        """Before training builds anything: refuses a store without targets (ConfigError), and puts what the config
        leaves to the data into it. Collective."""

    def build_model(self) -> nn.Module:
        """The unsharded model, the same for any number of ranks (unless tables exceed parallel.host_init_gib).

        Raises ConfigError for settings that exclude each other.
        """
        config, tables = self.config, [EventTable(name, self.rows[name]) for name in self.columns]
        if config.model.time is not Time.none:
            tables.append(EventTable("gap", NUM_GAP_BUCKETS))
        rows = sum(self.rows.values()) + config.memory.enabled * config.memory.num_keys**2
        torch.manual_seed(config.run.seed)
        try:
            return self._model(
                tables=tables,
                tower=config.model,
                memory=config.memory,
                max_history=config.data.max_history,
                autocast=autocast(config.run.precision, self.world.device),
                device=init_device(rows, config.model.width, config.parallel),
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    @abstractmethod
    def _model(self, **settings: Any) -> nn.Module:
        """settings: what the models of all tasks take."""

    @abstractmethod
    def train_reader(self) -> Reader:
        """Of the training part of the store. Raises DataError or ConfigError where a stage is empty."""

    def train_batches(self, reader: Reader, *, epoch: int, start_batch: int) -> Iterator[Batch]:
        """This rank's share of each global batch of an epoch, from start_batch on; all its windows, in order."""
        for batch in self._train_batches(reader, epoch=epoch, start_batch=start_batch):
            if self._counts_targets():
                batch.normaliser = over_ranks(batch.normaliser, self.world)
            yield batch

    @abstractmethod
    def _train_batches(self, reader: Any, *, epoch: int, start_batch: int) -> Iterator[Batch]:
        """train_batches, with the denominators of this rank alone."""

    def _counts_targets(self) -> bool:
        """Whether the number of targets of a global batch is known to no rank alone."""
        return True

    @abstractmethod
    def validation(self, run_dir: Path) -> Validation:
        """Judges the model while it is trained into run_dir."""

    def require_evaluable(self, config: EvaluateConfig, *, trained_on: DataConfig) -> None:  # noqa: B027
        """Before evaluation builds a model: ConfigError where the store holds no fair targets for it. Collective."""

    @abstractmethod
    def evaluate(self, model: nn.Module, config: EvaluateConfig) -> dict[str, Any]:
        """Figures of a trained model. Collective."""

    def mask_new_ids(self, histories: Sequences) -> Sequences:
        """Ids that came after the run was trained become UNKNOWN: its tables have no rows for them."""
        return replace(histories, columns={name: self._mask(name, ids) for name, ids in histories.columns.items()})

    def _mask(self, name: str, ids: np.ndarray) -> np.ndarray:
        return np.where(ids < self.rows[name], ids, UNKNOWN) if name in self.rows else ids

    def require_same_store(self) -> None:
        """Raises DataError where an append or an overwrite came between two ranks' opening of the store. Collective."""
        hashes = self.world.of_all(self.store_hash)
        if len(set(hashes)) > 1:
            raise DataError(
                f"{self.store.path}: changed while it was opened, rank 0 has version hash {hashes[0][:12]} and "
                f"another rank {next(other for other in hashes if other != hashes[0])[:12]}; run again"
            )

    def require_same_ids(self, digests: dict[str, str]) -> None:
        """Raises ConfigError for a store whose ids are not those of the run's tables, or those and newer ones.

        digests: of the vocabularies that the run was trained with; runs from before there were digests have none.
        """
        for name, rows in self.rows.items():
            vocabulary = self.vocabulary(name)
            have = vocabulary.size
            same = have >= rows and vocabulary.digest(rows) == digests[name] if name in digests else have == rows
            if not same:
                raise ConfigError(
                    f"store {self.store.path} has {have} ids in column {name!r}, the run's table {rows} rows: "
                    "the ids would not mean the same items; use the store of the run, or train on this one"
                )
            if have > rows:
                self.world.log(
                    f"column {name!r} has {have - rows} ids that are newer than the run: they count as unknown, and "
                    "are not recommended"
                )


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """run.precision as what the model enters."""
    if precision == "auto":
        has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if has_it else "float32"
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext


def length_names(edges: list[int]) -> list[str]:
    """[20, 50] -> 0-19, 20-49, 50+."""
    return [*(f"{low}-{high - 1}" for low, high in zip([0, *edges], edges, strict=False)), f"{[0, *edges][-1]}+"]
