"""The ELASTIC tower: a user's events in, K interests and one vector per user out, in time linear in the events.

Legend: B users (or prefixes), T events of all users, D width, K experts.

Paper form (bidirectional): every event may see later ones of the same prefix, so a target must come after its prefix.
"""

from __future__ import annotations

import torch
from torch import nn

from elastic_rec.models.tiles import TileLayout
from elastic_rec.models.towers.base import SequenceTower, TowerOutput
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.layer import LDAStack
from elastic_rec.models.towers.elastic.memory import InterestMemory, Seeds
from elastic_rec.models.towers.elastic.recency import Recency


@torch.fx.wrap
def tile(tokens_TD: torch.Tensor, offsets_B1: torch.Tensor) -> TileLayout:
    """The one place where a batch's layout is made."""
    return TileLayout.build(offsets_B1, tokens_TD.shape[0])


class Readout(nn.Module):
    """Experts -> TowerOutput. The user embedding is a linear map of the mean interest (ours). A map of its own for each
    expert, K·D·D weights, fitted MovieLens-100K no better in training and worse on held-out items."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.mix = nn.Linear(config.width, config.width)

    def forward(self, experts_BKD: torch.Tensor) -> TowerOutput:
        interests_BKD = self.norm(experts_BKD)
        return TowerOutput(interests_BKD, self.mix(interests_BKD.mean(1)))


class ElasticTower(SequenceTower):
    """forward(tokens_TD, offsets_B1, times_s_T) -> TowerOutput. all_positions must stay False: it raises ValueError.

    `memory` is an InterestMemory, or None when switched off: experts then start from learned seeds alone.
    TorchRec traces this forward (it owns the memory's bank): sub-module calls and indexing only.
    """

    has_memory = True

    def __init__(self, config: TowerConfig, memory: MemoryConfig, *, device: torch.device | str | None = None):
        super().__init__()
        self.recency = Recency(config)
        self.memory = InterestMemory(config, memory, device=device) if memory.enabled else None
        self.seeds = None if memory.enabled else Seeds(config)
        self.stack = LDAStack(config)
        self.summary = Readout(config)

    def forward(
        self, tokens_TD: torch.Tensor, offsets_B1: torch.Tensor, times_s_T: torch.Tensor, all_positions: bool = False
    ) -> TowerOutput:
        if all_positions:
            raise ValueError(
                "an output at each event would see later ones: set model.tower=elastic_causal, or another causal tower"
            )
        layout = tile(tokens_TD, offsets_B1)
        tokens_TD = self.recency(tokens_TD, times_s_T, layout)
        experts_BKD = self.seeds(layout.num_users) if self.memory is None else self.memory(tokens_TD, layout)
        return self.summary(self.stack(tokens_TD, experts_BKD, layout))
