"""The next-item task: a store, a model that fits it, and batches for each stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from elastic_rec.feature_store.batches.examples import NUM_GAP_BUCKETS, make_prefix_batch
from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.windows import HistoryWindows
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.vocabulary import UNKNOWN, Vocabulary
from elastic_rec.models.retrieval.model import EventTable, RetrievalModel
from elastic_rec.models.towers.config import Time
from elastic_rec.pipeline.config.verbs import TrainConfig
from elastic_rec.pipeline.runtime.sharding import init_device
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.base import autocast
from elastic_rec.pipeline.tasks.next_item.negative_sampling import FullCandidates, SampledCandidates

if TYPE_CHECKING:
    pass

ALL = 1 << 62  # more events than a history has


class NextItemTask:
    """What train, evaluate and score build alike from a training config."""

    metric = "ndcg@10"  # what the best checkpoint is chosen by

    def __init__(
        self, config: TrainConfig, *, world: World, store: str = "", rows: dict[str, int] | None = None
    ) -> None:
        """rows: of the tables of a trained run. A store that was appended to may have more ids: they are unknown."""
        self.config = config
        self.world = world
        # A run's generation says nothing about another store.
        self.store = Store.open(store) if store else Store.open(config.data.store, generation=config.data.generation)
        self.columns = ["item", *config.data.columns]
        self.rows = rows or {name: self.store.vocabulary(name).size for name in self.columns}
        self.num_items = self.rows["item"]

    def build_model(self) -> RetrievalModel:
        """The unsharded model, the same for any number of ranks (unless tables exceed parallel.host_init_gib)."""
        torch.manual_seed(self.config.run.seed)
        tables = [EventTable(name, self.rows[name]) for name in self.columns]
        if self.config.model.time is not Time.none and not self.config.model.kind.embeds_gaps:
            tables.append(EventTable("gap", NUM_GAP_BUCKETS))
        rows = sum(table.num_rows for table in tables) + self.config.memory.enabled * self.config.memory.num_keys**2
        return RetrievalModel(
            tables=tables,
            tower=self.config.model,
            memory=self.config.memory,
            softmax=self.config.loss.softmax,
            every_position=self.config.data.cuts == 0,
            windows=self.config.data.window > 0,
            max_history=self.config.data.max_history,
            autocast=autocast(self.config.run.precision, self.world.device),
            device=init_device(rows, self.config.model.width, self.config.parallel),
        )

    def train_reader(self) -> HistoryReader:
        return self._reader(self.config.optim.global_batch_size, shuffle=True)

    def train_batches(self, reader: HistoryReader, *, epoch: int, start_batch: int) -> Iterator[PrefixBatch]:
        """This rank's share of each global batch of an epoch, from start_batch on; all its windows, in order."""
        loss = self.config.loss
        if loss.softmax == "full":
            candidates = FullCandidates(self.num_items)
        else:
            counts = self.store.vocabulary("item").counts
            candidates = SampledCandidates(counts, loss, seed=self.config.run.seed)
        step = epoch * reader.num_batches + start_batch
        for histories in reader.epoch(epoch, start_batch=start_batch):
            for batch in self._batches(histories, "train", epoch=epoch, candidates=partial(candidates.at_step, step)):
                if self.world.device.type == "cuda":
                    batch = batch.pin_memory()  # from there the copy to the device runs beside the step before
                if self.config.data.cuts == 0:  # how many targets the global batch has is known to no rank alone
                    total = batch.normaliser.to(self.world.device)
                    dist.all_reduce(total)
                    batch.normaliser = total.clamp_min(1) / self.world.size
                yield batch
            step += 1

    def held_out(self, stage: str, *, batch_size: int) -> Iterator[tuple[Histories, Iterator[PrefixBatch]]]:
        """All users once, in a fixed order, with their "valid" or "test" target (weight 0 where there is none). A batch
        of users comes in all its windows (`query_windows`)."""
        for histories in self.histories(batch_size=batch_size, what=stage):
            yield histories, self._batches(histories, stage)

    def histories(self, *, batch_size: int, what: str = "all users") -> Iterator[Histories]:
        """All users once, in a fixed order, each rank its share of a global batch of batch_size users. what: names the
        pass where a rank is waited for."""
        for histories in self.world.pulse.pace(self._reader(batch_size, shuffle=False).epoch(0), what):
            yield self.known(histories)

    def file_histories(self, file_index: int, *, batch_size: int) -> Iterator[Histories]:
        """The users of one store file, for scoring."""
        for histories in self._reader(batch_size, shuffle=False).file_histories(file_index, batch_size):
            yield self.known(histories)

    def score_windows(self, histories: Histories, first_B: np.ndarray | None = None) -> Iterator[PrefixBatch]:
        """Histories to be scored, in windows; without each user's first_B events, which a state holds. Collective."""
        return self._batches(histories, "score", first_B=first_B)

    def known(self, histories: Histories) -> Histories:
        """Ids that came after the run was trained become UNKNOWN: its tables have no rows for them."""
        columns = {
            name: np.where(ids < self.rows[name], ids, UNKNOWN) if name in self.rows else ids
            for name, ids in histories.columns.items()
        }
        return replace(histories, columns=columns)

    def _reader(self, global_batch_size: int, *, shuffle: bool) -> HistoryReader:
        return HistoryReader(
            self.store,
            columns=self.columns,
            global_batch_size=global_batch_size,
            rank=self.world.rank,
            world_size=self.world.size,
            shuffle=shuffle,
            seed=self.config.run.seed,
        )

    def _batches(
        self, histories: Histories, stage: str, *, epoch: int = 0, candidates=None, first_B: np.ndarray | None = None
    ) -> Iterator[PrefixBatch]:
        """The batch of some histories, or its windows, of which all ranks make equally many."""
        size = self.config.data.window
        if not size and first_B is None:
            yield self._batch(histories, stage, epoch=epoch, candidates=candidates and candidates())
            return
        windows = HistoryWindows(histories, size=size or ALL, first_B=first_B, **self._settings(stage, epoch))
        count = torch.tensor(windows.count, device=self.world.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        for number in range(int(count)):
            yield windows.batch(number, int(count), candidates and candidates(window=number))

    def _batch(self, histories: Histories, stage: str, *, epoch: int = 0, candidates=None) -> PrefixBatch:
        cuts = self.config.data.cuts if stage == "train" else 1
        return make_prefix_batch(histories, cuts=cuts, candidates=candidates, **self._settings(stage, epoch))

    def _settings(self, stage: str, epoch: int) -> dict:
        data = self.config.data
        return {
            "split": data.split,
            "stage": stage,
            "max_history": data.max_history,
            "seed": self.config.run.seed,
            "epoch": epoch,
            "world_size": self.world.size,
        }

    def nobody(self) -> Histories:
        """One user without events: what a rank brings to a collective step when it has nothing left to do."""
        return Histories(
            rows=np.full(1, -1, dtype=np.int64),
            offsets=np.zeros(2, dtype=np.int64),
            columns={name: np.zeros(0, dtype=np.int64) for name in self.columns},
            times_s=np.zeros(0, dtype=np.int64),
            num_global_users=0,
        )

    def vocabulary(self, name: str) -> Vocabulary:
        return self.store.vocabulary(name)


def query_windows(
    model: RetrievalModel, windows: Iterator[PrefixBatch], device: torch.device
) -> tuple[torch.Tensor, PrefixBatch]:
    """The users' queries after all windows, one of which is on the device at a time, and the last of them."""
    for batch in windows:
        batch = batch.to(device)
        query_RD = model.query(batch)
    return query_RD, batch
