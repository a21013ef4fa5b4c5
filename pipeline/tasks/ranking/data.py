"""The data of the ranking task: batches of labelled impressions for each stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from elastic_rec.feature_store.batches.impression_batch import ImpressionBatch, Impressions, make_impression_batch
from elastic_rec.feature_store.reading.impression_groups import padding_impressions
from elastic_rec.feature_store.reading.impression_reader import ImpressionReader
from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.vocabulary import Vocabulary
from elastic_rec.feature_store.utils.jagged import Bags
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.finite import require_finite
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.base import Task


@dataclass
class RankingBatch(ImpressionBatch):
    """An ImpressionBatch as a model takes it: sharded lookups need a row, so an empty bag comes after item_context."""

    is_last_window = True

    @property
    def weights(self) -> torch.Tensor:
        """(C, L) float32: 0 for a candidate without this label."""
        return self.label_weights

    @staticmethod
    def of(impressions: Impressions) -> RankingBatch:
        """The batch of some impressions."""
        batch = make_impression_batch(impressions)
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        if batch.item_context is not None:
            values["item_context"] = _with_empty_bag(batch.item_context)
        return RankingBatch(**values)


def _with_empty_bag(bags: KeyedJaggedTensor) -> KeyedJaggedTensor:
    lengths = torch.nn.functional.pad(bags.lengths().view(len(bags.keys()), -1), (0, 1))
    return KeyedJaggedTensor(keys=bags.keys(), values=bags.values(), lengths=lengths.flatten())


class RankingData(Task):
    """What training, evaluation and scoring of the ranking task read. task.py has the rest."""

    def __init__(
        self, config: TrainConfig, *, world: World, store: str = "", rows: dict[str, int] | None = None
    ) -> None:
        """As Task has it. Raises DataError where the store has no impressions, too."""
        super().__init__(config, world=world, store=store, rows=rows)
        self.table = ImpressionTable(self.store)
        self.rows = rows or self.rows | self.table.table_sizes()

    @property
    def store_hash(self) -> str:
        """Of the histories and of the impressions beside them."""
        return super().store_hash + self.table.manifest.hash

    def vocabulary(self, name: str) -> Vocabulary:
        """Of an event column, or of a context column of impressions or items."""
        return super().vocabulary(name) if name in self.columns else self.table.vocabulary(name)

    def train_reader(self) -> ImpressionReader:
        """Raises DataError where there is nothing to train on, or nothing to validate by."""
        self._reader("valid", 1, shuffle=False)
        return self._reader("train", self.config.optim.global_batch_size, shuffle=True)

    def _train_batches(self, reader: ImpressionReader, *, epoch: int, start_batch: int) -> Iterator[RankingBatch]:
        for impressions in reader.epoch(epoch, start_batch=start_batch):
            yield RankingBatch.of(self.mask_impressions(impressions))

    def held_out(self, stage: str, *, batch_size: int, max_history: int = 0) -> Iterator[RankingBatch]:
        """All impressions of a stage once; batch_size: impression groups over all ranks. max_history: events an
        impression sees, exactly: it is then a group of its own, for a tower shows it all events of its group before."""
        reader = self._reader(stage, batch_size, shuffle=False, alone=max_history)
        for impressions in self.world.pulse.pace(reader.epoch(0), stage):
            yield RankingBatch.of(self.mask_impressions(impressions))

    def _reader(self, stage: str, global_batch_size: int, *, shuffle: bool, alone: int = 0) -> ImpressionReader:
        try:
            return ImpressionReader(
                self.store,
                columns=self.columns,
                split=self.config.data.impression_split,
                stage=stage,
                global_batch_size=global_batch_size,
                max_impressions_per_user=1 if alone else self.config.ranking.max_impressions_per_user,
                max_history=alone or self.config.data.max_history,
                rank=self.world.rank,
                world_size=self.world.size,
                shuffle=shuffle,
                seed=self.config.run.seed,
            )
        except ValueError as error:  # of the split's times
            raise ConfigError(f"data.impression_split: {error}") from error

    def padding_batch(self) -> RankingBatch:
        """What a rank brings to a collective step when it has nothing left to do."""
        table, columns = self.table, self.columns
        about = {"num_labels": len(table.labels), "context": table.context, "item_context": table.item_context}
        return RankingBatch.of(padding_impressions(columns, **about))

    def mask_impressions(self, impressions: Impressions) -> Impressions:
        """mask_new_ids for histories, candidates and both contexts."""

        def bags(found: dict[str, Bags]) -> dict[str, Bags]:
            return {name: bag._replace(values=self._mask(name, bag.values)) for name, bag in found.items()}

        return replace(
            impressions,
            histories=self.mask_new_ids(impressions.histories),
            candidates=bags({"item": impressions.candidates})["item"],
            context=bags(impressions.context),
            item_context=bags(impressions.item_context),
        )

    def finite_logits(self, model: nn.Module, batch: RankingBatch) -> np.ndarray:
        """(C, L) float32 on the host. NonFiniteError names user and item of the first that is not finite."""
        logits_CL = model.score(batch.to(self.world.device)).cpu()

        def name(c: int) -> str:
            row = batch.rows[batch.group[batch.impression[c]]].numpy()
            user = self.store.user_ids(row[None])[0] if row >= 0 else "without a history"
            item = self.store.vocabulary("item").decode(batch.features["candidate"].values()[c : c + 1].numpy())[0]
            return f"a list of user {user}, item {item}: take an earlier checkpoint=STEP, or look at their events"

        require_finite(logits_CL, "a logit", row_name=name)
        return logits_CL.numpy()
