"""The ranking task: labelled impressions, a model that fits their store, and batches for each stage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from elastic_rec.feature_store.batches.examples import NUM_GAP_BUCKETS
from elastic_rec.feature_store.batches.impression_batch import ImpressionBatch, Impressions, make_impression_batch
from elastic_rec.feature_store.reading.impression_groups import padding_impressions
from elastic_rec.feature_store.reading.impression_reader import ImpressionReader
from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.vocabulary import UNKNOWN, Vocabulary
from elastic_rec.feature_store.utils.jagged import Bags
from elastic_rec.models.ranking.config import History
from elastic_rec.models.ranking.model import RankingModel
from elastic_rec.models.retrieval.model import EventTable
from elastic_rec.models.towers.config import Time
from elastic_rec.pipeline.config.verbs import TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.finite import require_finite
from elastic_rec.pipeline.runtime.sharding import init_device
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.base import autocast
from elastic_rec.pipeline.tasks.ranking.metrics import RankingFigures


@dataclass
class RankingBatch(ImpressionBatch):
    """An ImpressionBatch as a model takes it: one empty bag behind item_context, since a sharded lookup needs a row."""

    is_last_window = True

    @property
    def weights(self) -> torch.Tensor:
        return self.label_weights

    @staticmethod
    def of(impressions: Impressions) -> RankingBatch:
        batch = make_impression_batch(impressions)
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        if batch.item_context is not None:
            values["item_context"] = _with_empty_bag(batch.item_context)
        return RankingBatch(**values)


def _with_empty_bag(bags: KeyedJaggedTensor) -> KeyedJaggedTensor:
    lengths = torch.nn.functional.pad(bags.lengths().view(len(bags.keys()), -1), (0, 1))
    return KeyedJaggedTensor(keys=bags.keys(), values=bags.values(), lengths=lengths.flatten())


class RankingTask:
    """What train, evaluate and score build alike from a training config with task=ranking."""

    metric = "auc"  # what the best checkpoint is chosen by

    def __init__(
        self, config: TrainConfig, *, world: World, store: str = "", rows: dict[str, int] | None = None
    ) -> None:
        """rows: of the tables of a trained run. A store that was appended to may have more ids: they are unknown."""
        self.config, self.world = config, world
        self.store = Store.open(store) if store else Store.open(config.data.store, version=config.data.version)
        self.table = ImpressionTable(self.store)
        self.columns = ["item", *config.data.columns]
        sizes = {name: self.store.vocabulary(name).size for name in self.columns}
        self.rows = rows or sizes | self.table.table_sizes()

    def build_model(self) -> RankingModel:
        """The unsharded model, the same for any number of ranks (unless tables exceed parallel.host_init_gib)."""
        config = self.config
        torch.manual_seed(config.run.seed)
        history = config.ranking.history
        if history is not History.tower:
            counts = "width, dropout, moments and chunk" if history is History.moments else "width and dropout"
            self.world.say(f"ranking.history={history.value}: no tower; of model.* only {counts} count")
        sizes = self.rows
        tables = [EventTable(name, sizes[name]) for name in self.columns]
        if config.model.time is not Time.none:
            tables.append(EventTable("gap", NUM_GAP_BUCKETS))
        rows = sum(sizes.values()) + config.memory.enabled * config.memory.num_keys**2
        try:
            return RankingModel(
                tables=tables,
                context=[EventTable(name, sizes[name]) for name in self.table.context],
                item_context=[EventTable(name, sizes[name]) for name in self.table.item_context],
                num_labels=len(self.table.labels),
                tower=config.model,
                memory=config.memory,
                ranking=config.ranking,
                max_history=config.data.max_history,
                autocast=autocast(config.run.precision, self.world.device),
                device=init_device(rows, config.model.width, config.parallel),
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def train_reader(self) -> ImpressionReader:
        """DataError where there is nothing to train on, or nothing to validate by."""
        self._reader("valid", 1, shuffle=False)
        return self._reader("train", self.config.optim.global_batch_size, shuffle=True)

    def train_batches(self, reader: ImpressionReader, *, epoch: int, start_batch: int) -> Iterator[RankingBatch]:
        """This rank's share of each global batch of an epoch, from start_batch on."""
        for impressions in reader.epoch(epoch, start_batch=start_batch):
            batch = RankingBatch.of(self.mask_new_ids(impressions))
            total = batch.normaliser.to(self.world.device)
            dist.all_reduce(total)
            batch.normaliser = total.clamp_min(1) / self.world.size
            yield batch

    def held_out(self, stage: str, *, batch_size: int, max_history: int = 0) -> Iterator[RankingBatch]:
        """All impressions of a stage once; batch_size: impression groups over all ranks. max_history: events an
        impression sees, exactly: it is then a group of its own, for a tower shows it all events of its group before."""
        reader = self._reader(stage, batch_size, shuffle=False, alone=max_history)
        for impressions in self.world.pulse.pace(reader.epoch(0), stage):
            yield RankingBatch.of(self.mask_new_ids(impressions))

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
        table = self.table
        return RankingBatch.of(
            padding_impressions(
                self.columns, num_labels=len(table.labels), context=table.context, item_context=table.item_context
            )
        )

    def vocabulary(self, name: str) -> Vocabulary:
        return self.store.vocabulary(name) if name in self.columns else self.table.vocabulary(name)

    def mask_new_ids(self, impressions: Impressions) -> Impressions:
        """Ids that came after the run was trained become UNKNOWN: its tables have no rows for them."""

        def old(name: str, ids: np.ndarray) -> np.ndarray:
            return np.where(ids < self.rows[name], ids, UNKNOWN) if name in self.rows else ids

        def bags(found: dict[str, Bags]) -> dict[str, Bags]:
            return {name: bag._replace(values=old(name, bag.values)) for name, bag in found.items()}

        histories = impressions.histories
        columns = {name: old(name, ids) for name, ids in histories.columns.items()}
        return replace(
            impressions,
            histories=replace(histories, columns=columns),
            candidates=old("item", impressions.candidates),
            context=bags(impressions.context),
            item_context=bags(impressions.item_context),
        )

    def evaluate(
        self, model: nn.Module, *, stage: str, length_edges: list[int], batch_size: int, max_history: int = 0
    ) -> dict:
        """Figures of the first label, by length of the history seen, and of each further label under "labels".
        max_history: as held_out. Collective."""
        model.eval()
        figures = RankingFigures(labels=self.table.labels, length_edges=length_edges, world=self.world)
        with torch.no_grad():
            for batch in self.held_out(stage, batch_size=batch_size, max_history=max_history):
                figures.update(batch, self.finite_logits(model, batch))
        return figures.compute()

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
