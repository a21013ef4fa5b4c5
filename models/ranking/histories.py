"""Who reads the user's history for a candidate: the tower, or a simpler model. All answer with vectors per candidate.

Legend: B impression groups (a user with some impressions), T their events end to end, I impressions, C candidates,
D width, K interests,
F vectors per candidate.

    forward(events_TD, candidates_CD, batch) -> (C, F, D)

What an impression sees is [starts, ends) of the T axis. A reader of each of these events costs O(events) per candidate;
the tower compresses them once, and a candidate then costs O(K).
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import nn
from torch.nn import functional as F

from elastic_rec.models.ranking.config import History, RankingConfig
from elastic_rec.models.ranking.target_attention import EventReader
from elastic_rec.models.retrieval.model import gather_prefixes
from elastic_rec.models.towers.base import TowerOutput, build_tower
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.models.towers.elastic.causal_tower import CausalTower
from elastic_rec.models.towers.elastic.moments import Moments, RunningMoments, moments_of
from elastic_rec.models.towers.elastic.recency import NUM_AGE_BUCKETS, age_bucket
from elastic_rec.models.towers.elastic.timeline import Timeline

torch.fx.wrap("gather_prefixes")

USER_EMBEDDING_GRADIENT = 0.01
CAUSAL_VIEWS = [slice(0, 3), slice(1, 2)]  # of (interests, moments, user embedding): all, and the moments alone


class TargetAttention(nn.Module):
    """A candidate reads the K interests of its impression: forward(interests_IKD, candidates_CD, impression_C), (C, D).

    The interests are few, so this is one small softmax: C·K products, whatever the history.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key_value = nn.Linear(config.width, 2 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self, interests_IKD: torch.Tensor, candidates_CD: torch.Tensor, impression_C: torch.Tensor
    ) -> torch.Tensor:
        (num, K, D), H = interests_IKD.shape, self.heads
        query_CHd = self.query(candidates_CD).view(-1, H, D // H) * (D // H) ** -0.5
        key_IKHd, value_IKHd = self.key_value(interests_IKD).view(num, K, 2, H, D // H).unbind(2)
        scores_CKH = (query_CHd[:, None] * key_IKHd.index_select(0, impression_C)).sum(-1)
        read_CHd = (scores_CKH.softmax(1)[..., None] * value_IKHd.index_select(0, impression_C)).sum(1)
        return self.out(read_CHd.flatten(1))


class MomentReader(nn.Module):
    """A candidate reads the moments of its impression's events, target attention to first order
    (towers/elastic/moments.py): forward(moments, candidates_CD, impression_C) -> mean + Cov q, (C, D);
    without directions the mean."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.scale = config.width**-0.5
        self.query_rD = nn.Parameter(torch.randn(config.moments, config.width) * self.scale) if config.moments else None

    def forward(self, moments: Moments, candidates_CD: torch.Tensor, impression_C: torch.Tensor) -> torch.Tensor:
        mean_CD = moments.mean.to(candidates_CD.dtype).index_select(0, impression_C)
        if self.query_rD is None:
            return mean_CD
        query_Cr = F.linear(candidates_CD, self.query_rD) * self.scale
        covariance_IrD = moments.covariance.to(query_Cr.dtype)
        if len(covariance_IrD) == 1:  # one request: its matrix need not be copied for each candidate
            return mean_CD + query_Cr @ covariance_IrD[0]
        return mean_CD + torch.bmm(query_Cr[:, None], covariance_IrD.index_select(0, impression_C)).squeeze(1)

    @torch.no_grad()
    def init_from(self, running: RunningMoments) -> None:
        """Untrained, a candidate then reads more of those events that are like it."""
        if self.query_rD is not None:
            self.query_rD.copy_(running.key_rD)


@torch.fx.wrap
def group_offsets(batch) -> torch.Tensor:
    """(B+1,) offsets of the impression groups on the T axis."""
    return batch.features["item"].offsets() - batch.features["item"].offsets()[0]


class CausalHistory(nn.Module):
    """One causal pass per impression group, read as of each impression (`Readings` in towers/elastic/timeline.py).

    An impression so sees every event of its group before it: its newest max_history ones at least, and those that an
    earlier impression of the group reaches back to."""

    def __init__(self, config: TowerConfig, memory: MemoryConfig, device=None):
        super().__init__()
        self.tower = CausalTower(config, memory, device=device)
        self.attention, self.moments = TargetAttention(config), MomentReader(config)
        init_as_means(self.tower, self.attention)
        self.moments.init_from(self.tower.moments)

    def forward(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor, batch) -> torch.Tensor:
        output = self.tower(events_TD, group_offsets(batch), batch.times_s, False, (batch.group, batch.ends))
        return self.read(output, candidates_CD, batch.impression)

    def read(self, output: TowerOutput, candidates_CD: torch.Tensor, impression_C: torch.Tensor):
        """(C, 3, D): what a candidate reads of the interests, of the moments, and the output of the newest event."""
        # An event's part in a mean has a gradient divided by their number, the newest one's has not, and its item's row
        # is a candidate's too: taste was learned late (docs/lab-log.md). AdamW does not mind the factor, tables do.
        share, user_ID = USER_EMBEDDING_GRADIENT, output.user_embedding
        user_ID = share * user_ID + (1 - share) * user_ID.detach()
        read_CD = self.attention(output.interests, candidates_CD, impression_C)
        moments_CD = self.moments(output.moments, candidates_CD, impression_C).to(read_CD.dtype)
        return torch.stack([read_CD, moments_CD, user_ID.index_select(0, impression_C)], dim=1)


@torch.no_grad()
def init_as_means(tower: CausalTower, attention: TargetAttention) -> None:
    """Values and what mixes them begin as the identity, seeds small: untrained, a candidate then reads means of events,
    one per expert, in the space of its own vector, in which like and unlike are a product away. From random
    projections a tower learns late whose taste is whose (docs/lab-log.md).

    The mean of many events is a short vector: 4 times it is about as long as an event."""
    D = tower.config.width
    identity_DD = torch.eye(D)
    for aggregate in (tower.first, *tower.stack.aggregates):
        aggregate.qkv.weight[2 * D :] = identity_DD
    for layer in tower.stack.layers:
        layer.mix.weight.copy_(4 * identity_DD)
    attention.key_value.weight[D:] = identity_DD
    attention.out.weight.copy_(identity_DD)
    seeds = tower.seeds if tower.memory is None else tower.memory.select.seeds
    seeds.seeds_KD.mul_(0.1)


class MomentHistory(nn.Module):
    """The moments of the events before each impression alone, without the rest of the tower: forward -> (C, 1, D)."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.chunk, self.running, self.reader = config.chunk, RunningMoments(config), MomentReader(config)
        self.reader.init_from(self.running)

    def forward(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor, batch) -> torch.Tensor:
        readings = batch.group, batch.ends
        timeline = Timeline.build(group_offsets(batch), batch.times_s, self.chunk, readings=readings)
        return self.reader(moments_of(self.running(events_TD, timeline)), candidates_CD, batch.impression)[:, None]


class PrefixHistory(nn.Module):
    """Towers that cannot be read in between: a copy of its events, and a pass, for each impression."""

    def __init__(self, config: TowerConfig, memory: MemoryConfig, max_history: int, device=None):
        super().__init__()
        self.tower = build_tower(config, memory, max_history=max_history, device=device)
        self.attention = TargetAttention(config)

    def forward(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor, batch) -> torch.Tensor:
        prefixes = gather_prefixes(events_TD, batch.times_s, batch.starts, batch.ends)
        output = self.tower(prefixes.tokens_PD, prefixes.offsets_R1, prefixes.times_s_P, False)
        read_CD = self.attention(output.interests, candidates_CD, batch.impression)
        return torch.stack([read_CD, output.user_embedding.index_select(0, batch.impression)], dim=1)


class NoHistory(nn.Module):
    """No vector at all; the events stay in the graph, since DDP waits for a gradient of every parameter."""

    def forward(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor, batch) -> torch.Tensor:
        return (0 * events_TD.sum()).expand(candidates_CD.shape[0], 0, candidates_CD.shape[1])


class MeanHistory(nn.Module):
    """The mean of the events that an impression sees, zeros where it sees none: differences of running sums."""

    def forward(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor, batch) -> torch.Tensor:
        sums_T1D = F.pad(events_TD.double().cumsum(0), (0, 0, 1, 0))
        sum_ID = sums_T1D[batch.ends] - sums_T1D[batch.starts]
        mean_ID = (sum_ID / (batch.ends - batch.starts).clamp_min(1)[:, None]).to(events_TD.dtype)
        return mean_ID[batch.impression][:, None]


def build_history(
    ranking: RankingConfig, tower: TowerConfig, memory: MemoryConfig, *, max_history: int, device=None
) -> tuple[nn.Module, list[slice]]:
    """(the reader, its views: which of its vectors per candidate each head sees)."""
    one = [slice(0, 1)]
    match ranking.history:
        case History.tower if tower.kind.has_states:
            return CausalHistory(tower, memory, device), CAUSAL_VIEWS
        case History.tower:
            return PrefixHistory(tower, memory, max_history, device), [slice(0, 2)]
        case History.none:
            return NoHistory(), [slice(0, 0)]
        case History.moments:
            return MomentHistory(tower), one
        case History.mean:
            return MeanHistory(), one
        case History.din:
            return EventReader(tower.width, ranking.last_n), one
        case History.sim:
            return EventReader(tower.width, ranking.last_n, ranking.top_k), one
    assert_never(ranking.history)


class QueryGap(nn.Module):
    """Seconds from the newest event an impression sees to the impression, as a vector: forward -> (C, 1, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.by_gap = nn.Parameter(torch.randn(NUM_AGE_BUCKETS + 1, width) * 0.1)

    def forward(self, batch) -> torch.Tensor:
        bucket_I = age_bucket(batch.query_gap_s).masked_fill(batch.query_gap_s < 0, NUM_AGE_BUCKETS)
        return F.embedding(bucket_I[batch.impression], self.by_gap)[:, None]
