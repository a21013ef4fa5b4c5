"""How long ago an event happened, counted in events and in seconds, both from the end of its prefix (ours).

LDA sees a user's events as a set; these two small tables tell it their order. Counting from the end of the prefix leaks
nothing: each prefix is encoded on its own, and neither the target nor its time enters.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from elastic_rec.models.tiles import TileLayout
from elastic_rec.models.towers.config import Time, TowerConfig

NUM_EXACT = 16  # the newest events get a bucket each; after them two buckets per doubling
NUM_POSITION_BUCKETS = NUM_EXACT + 2 * 20  # up to 16 * 2^20 events, older ones share the last bucket
NUM_AGE_BUCKETS = 40  # bit length of the age in seconds: 2^39 s is 17,000 years


def position_bucket(position_T: torch.Tensor) -> torch.Tensor:
    """Events between this one and the prefix's end (0 for the newest) -> bucket id."""
    doublings_T = torch.log2(position_T.clamp_min(NUM_EXACT).double() / NUM_EXACT)
    bucket_T = torch.where(position_T < NUM_EXACT, position_T, NUM_EXACT + (2 * doublings_T).long())
    return bucket_T.clamp_max(NUM_POSITION_BUCKETS - 1)


def age_bucket(age_s_T: torch.Tensor) -> torch.Tensor:
    """Seconds before the prefix's last event -> bit length, so [2^(i-1), 2^i) shares bucket i and 0 has its own."""
    return torch.frexp(age_s_T.clamp_min(0).double()).exponent.long().clamp_max(NUM_AGE_BUCKETS - 1)


class Recency(nn.Module):
    """forward(tokens_TD, times_s_T, layout) -> tokens_TD plus both embeddings; without time, that of positions only."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.position = nn.Parameter(torch.randn(NUM_POSITION_BUCKETS, config.width) * 0.5)
        self.age = None
        if config.time is not Time.none:
            self.age = nn.Parameter(torch.randn(NUM_AGE_BUCKETS, config.width) * 0.5)

    def forward(self, tokens_TD: torch.Tensor, times_s_T: torch.Tensor, layout: TileLayout) -> torch.Tensor:
        last_T = (layout.offsets_B1[1:] - 1)[layout.user_T]
        position_T = last_T - torch.arange(last_T.numel(), device=last_T.device)
        tokens_TD = tokens_TD + F.embedding(position_bucket(position_T), self.position)
        if self.age is None:
            return tokens_TD
        return tokens_TD + F.embedding(age_bucket(times_s_T[last_T] - times_s_T), self.age)
