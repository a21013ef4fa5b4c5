"""What full and incremental scoring share: the top-k lists of users, and what they depend on.

OUT/part-00003.parquet    the users of the store's bucket 3: user_id, item_ids list, scores list; best first
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from elastic_rec.feature_store.batches.histories import Histories
from elastic_rec.feature_store.table.schema import ARROW_TYPES
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.config.score import TopKConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.finite import require_finite
from elastic_rec.pipeline.tasks.next_item.data import NextItemData
from elastic_rec.pipeline.tasks.next_item.evaluation import open_catalogue, seen_pairs, user_namer
from elastic_rec.pipeline.tasks.next_item.query_time import query_time_s
from elastic_rec.pipeline.tasks.next_item.sharded_topk import ShardedCatalogue
from elastic_rec.pipeline.tasks.next_item.targets import resolve_seen
from elastic_rec.pipeline.tasks.scoring import Scoring


class TopKScoring(Scoring):
    """A part per bucket of the store; its number is the bucket's."""

    def __init__(
        self, task: NextItemData, model: nn.Module, *, step: int, fingerprint: str, config: TopKConfig
    ) -> None:
        self.task, self.model, self.config, self.world = task, model, config, task.world
        self.asked_s = query_time_s(task, config)
        self.seen = resolve_seen(task, config.seen or task.config.data.seen)
        self.numbers = [file.bucket for file in task.store.files]
        self.settings = {
            "mode": self.command,
            "run": str(Path(config.run).resolve()),
            "step": step,
            "k": config.k,
            "seen": self.seen.value,
        }
        self.manifest = {"unit": "users", "k": config.k}

    @staticmethod
    def run_config(run: TrainConfig, config: TopKConfig) -> TrainConfig:
        """With histories in windows, where the tower can carry a state."""
        run.data.window = config.window if run.model.kind.has_states else 0
        return run

    @cached_property
    def catalogue(self) -> ShardedCatalogue:
        """All items, over this model's item table."""
        return open_catalogue(self.model, self.world)

    def recommend(self, query_RD: torch.Tensor, histories: Histories) -> pa.Table:
        """Top-k of each user, padding left out. histories: what they have seen. Collective.

        Raises NonFiniteError for a query or score that is no number.
        """
        require_finite(query_RD, "the query", row_name=user_namer(self.task, histories))
        seen = None
        if self.seen is Seen.exclude:
            seen = seen_pairs(histories, np.diff(histories.offsets), self.world.device)
        ids_Rk, score_Rk = (found.cpu() for found in self.catalogue.top_k(query_RD, self.config.k, seen))
        real = histories.rows >= 0
        ids_Rk, score_Rk = ids_Rk[torch.from_numpy(real)], score_Rk[torch.from_numpy(real)]
        filled = ids_Rk >= 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), filled.sum(1).cumsum(0)]).to(torch.int32).numpy()
        item_ids = self.task.store.vocabulary("item").decode(ids_Rk[filled].numpy())
        user, item = (ARROW_TYPES[self.task.store.manifest["vocabularies"][name]["type"]] for name in ("user", "item"))
        columns = {
            "item_ids": (item_ids, pa.list_(pa.field("element", item))),
            "scores": (pa.array(score_Rk[filled].numpy()), pa.list_(pa.field("element", pa.float32()))),
        }
        lists = [pa.ListArray.from_arrays(pa.array(offsets), values, type=kind) for values, kind in columns.values()]
        schema = pa.schema({"user_id": user, **{name: kind for name, (_, kind) in columns.items()}})
        return pa.table([self.task.store.user_ids(histories.rows[real]), *lists], schema=schema)
