"""Who reads the user's history for a candidate: the tower, or one of its peers. All answer with vectors per candidate.

Legend: B visits (a user with some impressions), T their events end to end, I impressions, C candidates, D width,
K interests, P pairs (candidate, event), F vectors.

    forward(events_TD, candidates_CD, batch) -> (C, F, D)

What an impression sees is [starts, ends) of the T axis. A reader of each of these events costs O(events) per candidate;
the tower compresses them once, and a candidate then costs O(K).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from elastic_rec.models.elastic.as_of import AsOf, AsOfTower
from elastic_rec.models.elastic.config import Attention, MemoryConfig, TowerConfig
from elastic_rec.models.elastic.recency import NUM_AGE_BUCKETS, age_bucket
from elastic_rec.models.elastic.tower import build_tower
from elastic_rec.models.heads.ranking_config import History, RankingConfig
from elastic_rec.models.heads.retrieval import PrefixGather


class TargetAttention(nn.Module):
    """A candidate reads the K interests of its impression: forward -> (C, 2, D), what it read and the summary (ours).

    The interests are few, so this is one small softmax: C·K products, whatever the history.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key_value = nn.Linear(config.width, 2 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, output: AsOf, candidates_CD: torch.Tensor, impression_C: torch.Tensor) -> torch.Tensor:
        interests_IKD = output.interests
        (num, K, D), H = interests_IKD.shape, self.heads
        query_CHd = self.query(candidates_CD).view(-1, H, D // H) * (D // H) ** -0.5
        key_IKHd, value_IKHd = self.key_value(interests_IKD).view(num, K, 2, H, D // H).unbind(2)
        scores_CKH = (query_CHd[:, None] * key_IKHd.index_select(0, impression_C)).sum(-1)
        read_CHd = (scores_CKH.softmax(1)[..., None] * value_IKHd.index_select(0, impression_C)).sum(1)
        read_CD = self.out(read_CHd.flatten(1))
        return torch.stack([read_CD, output.summary.index_select(0, impression_C)], dim=1)


class VisitOffsets(nn.Module):
    """forward(batch) -> (B+1,) offsets of the visits on the T axis."""

    def forward(self, batch) -> torch.Tensor:
        return batch.features["item"].offsets() - batch.features["item"].offsets()[0]


class CausalHistory(nn.Module):
    """One causal pass per visit, read as of each impression (elastic/as_of.py).

    An impression so sees every event of its visit before it: its newest max_history ones at least, and those that an
    earlier impression of the visit reaches back to."""

    def __init__(self, config: TowerConfig, memory: MemoryConfig, device=None):
        super().__init__()
        self.offsets = VisitOffsets()
        self.tower = AsOfTower(config, memory, device=device)
        self.attention = TargetAttention(config)

    def forward(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor, batch) -> torch.Tensor:
        output = self.tower(events_TD, self.offsets(batch), batch.times_s, batch.visit, batch.ends)
        return self.attention(output, candidates_CD, batch.impression)


class PrefixHistory(nn.Module):
    """Towers that cannot be read in between: a copy of its events, and a pass, for each impression."""

    def __init__(self, config: TowerConfig, memory: MemoryConfig, max_history: int, device=None):
        super().__init__()
        self.prefixes = PrefixGather()
        self.tower = build_tower(config, memory, max_history=max_history, device=device)
        self.attention = TargetAttention(config)

    def forward(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor, batch) -> torch.Tensor:
        prefixes = self.prefixes(events_TD, batch.times_s, batch.starts, batch.ends)
        output = self.tower(prefixes.tokens_PD, prefixes.offsets_R1, prefixes.times_s_P, False)
        return self.attention(output, candidates_CD, batch.impression)


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


class Pairs(nn.Module):
    """forward(batch) -> (candidate_P, event_P, offsets_C1): every candidate with the newest last_n events it sees."""

    def __init__(self, last_n: int):
        super().__init__()
        self.last_n = last_n

    def forward(self, batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ends_C = batch.ends[batch.impression]
        starts_C = torch.maximum(batch.starts[batch.impression], ends_C - self.last_n)
        lengths_C = ends_C - starts_C
        offsets_C1 = torch.cat([lengths_C.new_zeros(1), lengths_C.cumsum(0)])
        num = int(offsets_C1[-1])
        candidate_P = torch.repeat_interleave(lengths_C, output_size=num)
        event_P = torch.arange(num, device=lengths_C.device) + (starts_C - offsets_C1[:-1])[candidate_P]
        return candidate_P, event_P, offsets_C1


class ActivationUnit(nn.Module):
    """DIN's MLP on (candidate, event, their product), a number per pair; softmax over a candidate's events, so that 50
    and 1,000 of them are on one scale (ours; the paper leaves the weights as they are). Its halves on the candidate
    and on the event are computed once each, the pair's only on the product."""

    def __init__(self, width: int, hidden: int = 32):
        super().__init__()
        self.event = nn.Linear(width, hidden)
        self.candidate = nn.Linear(width, hidden, bias=False)
        self.product = nn.Linear(width, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, events_TD, candidates_CD, candidate_P, event_P) -> torch.Tensor:
        C, D = candidates_CD.shape
        picked_PD = events_TD.index_select(0, event_P)
        product_Ph = self.product(picked_PD * candidates_CD.index_select(0, candidate_P))
        hidden_Ph = product_Ph + self.event(events_TD).index_select(0, event_P)
        hidden_Ph = hidden_Ph + self.candidate(candidates_CD).index_select(0, candidate_P)
        scores_P = self.score(F.gelu(hidden_Ph)).squeeze(1)
        max_C = scores_P.detach().new_full((C,), -torch.inf).scatter_reduce(0, candidate_P, scores_P.detach(), "amax")
        weights_P = (scores_P - max_C[candidate_P]).exp()
        norm_C = weights_P.new_zeros(C).index_add(0, candidate_P, weights_P)
        read_CD = picked_PD.new_zeros(C, D).index_add(0, candidate_P, weights_P[:, None] * picked_PD)
        return (read_CD / (norm_C + (norm_C == 0))[:, None])[:, None]


class DinHistory(nn.Module):
    """Deep Interest Network (Zhou et al. 2018, arXiv 1706.06978): the candidate attends over the newest events."""

    def __init__(self, width: int, last_n: int):
        super().__init__()
        self.pairs, self.unit = Pairs(last_n), ActivationUnit(width)

    def forward(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor, batch) -> torch.Tensor:
        candidate_P, event_P, _ = self.pairs(batch)
        return self.unit(events_TD, candidates_CD, candidate_P, event_P)


class SimHistory(nn.Module):
    """Two stages after SIM (Pi et al. 2020, arXiv 2006.05639), soft search: the top_k events by dot product with the
    candidate, then attention over those. The search takes the model's own vectors, without a gradient (ours)."""

    def __init__(self, width: int, last_n: int, top_k: int):
        super().__init__()
        self.pairs, self.unit, self.top_k = Pairs(last_n), ActivationUnit(width), top_k

    def forward(self, events_TD: torch.Tensor, candidates_CD: torch.Tensor, batch) -> torch.Tensor:
        candidate_P, event_P, offsets_C1 = self.pairs(batch)
        near_P = self.nearest(events_TD.detach(), candidates_CD.detach(), candidate_P, event_P, offsets_C1)
        return self.unit(events_TD, candidates_CD, candidate_P[near_P], event_P[near_P])

    def nearest(self, events_TD, candidates_CD, candidate_P, event_P, offsets_C1) -> torch.Tensor:
        """Which pairs are among their candidate's top_k; the newer of two equal ones first."""
        scores_P = (events_TD[event_P] * candidates_CD[candidate_P]).sum(-1)
        order_P = torch.arange(len(scores_P), device=scores_P.device).flip(0)
        order_P = order_P[scores_P[order_P].sort(descending=True, stable=True).indices]
        order_P = order_P[candidate_P[order_P].sort(stable=True).indices]
        place_P = torch.arange(len(scores_P), device=scores_P.device) - offsets_C1[:-1][candidate_P[order_P]]
        return order_P[place_P < self.top_k]


def build_history(
    ranking: RankingConfig, tower: TowerConfig, memory: MemoryConfig, *, max_history: int, device=None
) -> tuple[nn.Module, int]:
    """(the reader, how many vectors per candidate it gives)."""
    if ranking.history is History.tower:
        if tower.attention is Attention.causal:
            return CausalHistory(tower, memory, device), 2
        return PrefixHistory(tower, memory, max_history, device), 2
    if ranking.history is History.none:
        return NoHistory(), 0
    if ranking.history is History.mean:
        return MeanHistory(), 1
    if ranking.history is History.din:
        return DinHistory(tower.width, ranking.last_n), 1
    return SimHistory(tower.width, ranking.last_n, ranking.top_k), 1


class QueryGap(nn.Module):
    """Seconds from the newest event an impression sees to the impression, as a vector: forward -> (C, 1, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.by_gap = nn.Parameter(torch.randn(NUM_AGE_BUCKETS + 1, width) * 0.1)

    def forward(self, batch) -> torch.Tensor:
        bucket_I = age_bucket(batch.query_gap_s).masked_fill(batch.query_gap_s < 0, NUM_AGE_BUCKETS)
        return F.embedding(bucket_I[batch.impression], self.by_gap)[:, None]
