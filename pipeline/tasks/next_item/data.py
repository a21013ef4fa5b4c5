"""The data of the next-item task: batches of histories for each stage."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from elastic_rec.feature_store.batches.examples import make_prefix_batch
from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import Targets
from elastic_rec.feature_store.batches.windows import HistoryWindows
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.pipeline.tasks.base import Task
from elastic_rec.pipeline.tasks.next_item.negative_sampling import make_candidates
from elastic_rec.pipeline.tasks.scoring import ALL


class NextItemData(Task):
    """What training, evaluation, baselines and scoring of the next-item task read. task.py has the rest."""

    @property
    def num_items(self) -> int:
        """Rows of the item table: items, and the ids below FIRST."""
        return self.rows["item"]

    @property
    def every_position(self) -> bool:
        """Whether training has a target after every event."""
        return self.config.data.targets is Targets.every_event

    def train_reader(self) -> HistoryReader:
        """Of all users, in an order that changes with each epoch."""
        return self._reader(self.config.optim.global_batch_size, shuffle=True)

    def _train_batches(self, reader: HistoryReader, *, epoch: int, start_batch: int) -> Iterator[PrefixBatch]:
        items, seed = self.store.vocabulary("item"), self.config.run.seed
        candidates = make_candidates(self.config.loss, items=items, num_items=self.num_items, seed=seed)
        first_step = epoch * reader.num_batches + start_batch
        for step, histories in enumerate(reader.epoch(epoch, start_batch=start_batch), first_step):
            for batch in self._batches(histories, "train", epoch=epoch, candidates=partial(candidates.at_step, step)):
                # From pinned memory the copy to the device runs beside the step before.
                yield batch.pin_memory() if self.world.device.type == "cuda" else batch

    def _counts_targets(self) -> bool:
        return self.every_position

    def held_out(self, stage: str, *, batch_size: int) -> Iterator[tuple[Sequences, Iterator[PrefixBatch]]]:
        """All users once, in a fixed order, with their "valid" or "test" target (weight 0 where there is none). A batch
        of users comes in all its windows (`query_windows`). Collective."""
        for histories in self.histories(batch_size=batch_size, what=stage):
            yield histories, self._batches(histories, stage)

    def histories(self, *, batch_size: int, what: str = "all users") -> Iterator[Sequences]:
        """All users once, in a fixed order, each rank its share of a global batch of batch_size users. what: names the
        pass where a rank is waited for. Collective."""
        for histories in self.world.pulse.pace(self._reader(batch_size, shuffle=False).epoch(0), what):
            yield self.mask_new_ids(histories)

    def file_histories(self, file_index: int, *, batch_size: int) -> Iterator[Sequences]:
        """The users of one store file, for scoring."""
        for histories in self._reader(batch_size, shuffle=False).file_histories(file_index, batch_size):
            yield self.mask_new_ids(histories)

    def score_windows(self, histories: Sequences, first_B: np.ndarray | None = None) -> Iterator[PrefixBatch]:
        """Histories to be scored, in windows; without each user's first_B events, which a state holds. Collective."""
        return self._batches(histories, "score", first_B=first_B)

    def padding_histories(self) -> Sequences:
        """One user without events: what a rank brings to a collective step when it has nothing left to do."""
        return Sequences.padding(self.columns)

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
        self, histories: Sequences, stage: str, *, epoch: int = 0, candidates=None, first_B: np.ndarray | None = None
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

    def _batch(self, histories: Sequences, stage: str, *, epoch: int = 0, candidates=None) -> PrefixBatch:
        data = self.config.data
        drawn = {"targets": data.targets, "prefixes_per_user": data.prefixes_per_user}
        return make_prefix_batch(histories, candidates=candidates, **drawn, **self._settings(stage, epoch))

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
