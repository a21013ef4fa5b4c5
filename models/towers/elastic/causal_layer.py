"""One causal layer: events are folded into running sums, experts are read off them, events read both (ours).

Legend: B users, T new events, E the same with events kept in the users' states, H heads, d = D/H, K experts, C events
per chunk, R boundaries between chunks (models/ops/causal_lda/chunks.py), and after them I readings (timeline.py).

    q, k, v = X Wqkv
    P_r  = running softmax mean of v up to boundary r, scores e · k, e learned per expert, old events fading  (R, K, D)
    Y'   = Y + Wo1 P;                 Y'' = Y' + FFN(Y')        Y: experts at every boundary
    X'   = X + Wo2 softmax_[K experts at the chunk's start ; events of the chunk before and the own]( q · keys ) values
    X''  = X' + FFN(X')

Keys and values are shared by both attentions: a user's state is then the sums and one key and value per open event.
Order comes from a learned bias per head and number of events between (at most 2C - 1).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from elastic_rec.models.dropout import Dropout
from elastic_rec.models.ops.causal_lda import Partial, causal_aggregate, causal_dispatch, combine
from elastic_rec.models.towers.config import Reads, Time, TowerConfig
from elastic_rec.models.towers.elastic.layer import FeedForward
from elastic_rec.models.towers.elastic.timeline import Readings, Timeline

SHORTEST_S, LONGEST_S = 3600.0, 3.0e8  # half-lives at the start of training: an hour to ten years, evenly in the log


class LayerSums(NamedTuple):
    """What one layer knows of the events: query, key, value of each (E, 3, H, d), and running sums.

    sums: a row for each of R boundaries, then for each of I readings. mean_RKD: what the sums mean, (R + I, K, D)."""

    qkv_E3Hd: torch.Tensor
    sums: Partial
    mean_RKD: torch.Tensor

    def of(self, event_E: torch.Tensor, boundary_R: torch.Tensor) -> LayerSums:
        """Some events and boundaries only."""
        return LayerSums(
            self.qkv_E3Hd.index_select(0, event_E),
            self.sums.rows(boundary_R),
            self.mean_RKD.index_select(0, boundary_R),
        )


class CausalAggregate(nn.Module):
    """Events into running sums: forward(tokens_TD, timeline) -> LayerSums.

    number: which layer's part of a state it is. ask_HKd: the experts' queries, one per head and expert."""

    def __init__(self, config: TowerConfig, number: int):
        super().__init__()
        self.heads, self.number = config.heads, number
        head_width = config.width // config.heads
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.ask_HKd = nn.Parameter(torch.randn(config.heads, config.experts, head_width))
        if config.half_life and config.time is not Time.none:
            half_life_s_K = torch.logspace(math.log10(SHORTEST_S), math.log10(LONGEST_S), config.experts)
            self.log_half_life_K = nn.Parameter(half_life_s_K.log())
        else:
            self.log_half_life_K = None

    @property
    def decay_per_s_HK(self) -> torch.Tensor:
        """ln 2 / half-life, (H, K); zeros where nothing fades."""
        if self.log_half_life_K is None:
            return self.ask_HKd.new_zeros(self.ask_HKd.shape[:2])
        return (math.log(2) * (-self.log_half_life_K).exp()).expand(self.heads, -1)

    def forward(self, tokens_TD: torch.Tensor, timeline: Timeline) -> LayerSums:
        H, _, d = self.ask_HKd.shape
        # Queries are scaled by 1/sqrt(d) through their weights: D·D numbers instead of T·D.
        scale = torch.cat([self.qkv.weight.new_full((H * d, 1), d**-0.5), self.qkv.weight.new_ones(2 * H * d, 1)])
        qkv, start = F.linear(self.norm(tokens_TD), self.qkv.weight * scale).view(-1, 3, H, d), None
        if timeline.state is not None:
            kept_BW3Hd = F.pad(timeline.state.kept(self.number), (0, 0, 0, 0, 1, 0))  # no output wanted: any query
            qkv, start = timeline.join(kept_BW3Hd, qkv), timeline.state.sums(self.number)
        sums = causal_aggregate(
            self.ask_HKd * d**-0.5, qkv, timeline.times_s_E, self.decay_per_s_HK, timeline.chunks, start
        )
        if timeline.readings is not None:
            sums = Partial(
                *map(torch.cat, zip(sums, self._sums_at(timeline.readings, qkv, sums, timeline), strict=True))
            )
        return LayerSums(qkv, sums, sums.mean().transpose(1, 2).flatten(2))

    def _sums_at(self, at: Readings, qkv_E3Hd: torch.Tensor, sums: Partial, timeline: Timeline) -> Partial:
        """The running sums at each reading, I rows: of the boundary before it, and of the events it sees after that."""
        before = sums.rows(at.boundary_I)
        if not at.event_IC.numel():
            return before
        wide, d = before.norm_RHK.dtype, self.ask_HKd.shape[-1]
        key_ICHd, value_ICHd = qkv_E3Hd[:, 1:][at.event_IC].to(wide).unbind(2)
        clock_I = timeline.times_s_E[at.newest_I]
        age_IC = (clock_I[:, None] - timeline.times_s_E[at.event_IC]).clamp_min(0).to(wide)
        scores_IHKC = torch.einsum("ichd,hkd->ihkc", key_ICHd, self.ask_HKd.to(wide) * d**-0.5)
        scores_IHKC = scores_IHKC - age_IC[:, None, None] * self.decay_per_s_HK.to(wide)[..., None]
        seen_I11C = at.seen_IC[:, None, None]
        max_IHK = scores_IHKC.detach().masked_fill(~seen_I11C, -torch.inf).amax(-1)
        max_IHK = max_IHK.masked_fill(~at.sees_I[:, None, None], 0.0)
        weights_IHKC = (scores_IHKC - max_IHK[..., None]).masked_fill(~seen_I11C, -torch.inf).exp()
        sum_IHKd = torch.einsum("ihkc,ichd->ihkd", weights_IHKC, value_ICHd)
        return combine(before, Partial(max_IHK.double(), weights_IHKC.sum(-1), sum_IHKd, clock_I), self.decay_per_s_HK)


class CausalLayer(nn.Module):
    """What follows on the sums: forward(tokens_TD, experts_RKD, layer_sums, timeline) -> (tokens_TD, experts_RKD)."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        width, multiple = config.width, config.ffn_multiple
        self.heads, self.reads = config.heads, config.reads
        self.mix = nn.Linear(width, width, bias=False)
        self.expert_ffn = FeedForward(width, multiple, config.dropout)
        self.norm_experts = nn.LayerNorm(width)
        self.expert_key_value = nn.Linear(width, 2 * width, bias=False)
        self.bias_HW = nn.Parameter(torch.zeros(config.heads, 2 * config.chunk))
        self.out = nn.Linear(width, width, bias=False)
        self.token_ffn = FeedForward(width, multiple, config.dropout)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, tokens_TD: torch.Tensor, experts_RKD: torch.Tensor, layer_sums: LayerSums, timeline: Timeline
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (_, K, D), R = experts_RKD.shape, timeline.chunks.num_boundaries  # no event sees the readings, which come after
        experts_RKD = experts_RKD + self.dropout(self.mix(layer_sums.mean_RKD))
        experts_RKD = experts_RKD + self.expert_ffn(experts_RKD)
        key_value = self.expert_key_value(self.norm_experts(experts_RKD[:R])).view(R, K, 2, self.heads, D // self.heads)
        if self.reads is Reads.events:
            key_value = key_value[:, :0]
        bias_HW = torch.full_like(self.bias_HW, -torch.inf) if self.reads is Reads.experts else self.bias_HW
        mix_EHd = causal_dispatch(layer_sums.qkv_E3Hd, key_value, bias_HW, timeline.chunks)
        tokens_TD = tokens_TD + self.dropout(self.out(timeline.new(mix_EHd).flatten(1)))
        return tokens_TD + self.token_ffn(tokens_TD), experts_RKD


class Depth(NamedTuple):
    """tokens_TD and experts_RKD after all layers, on the axes of `timeline`: the batch's, or of its newest events only.
    layer_sums: each layer's, always of the whole batch, from which a state is made."""

    tokens_TD: torch.Tensor
    experts_RKD: torch.Tensor
    timeline: Timeline
    layer_sums: list[LayerSums]


class CausalStack(nn.Module):
    """All layers but the first one's aggregate, which the memory's queries are taken from.

    all_positions: an output at each event. False: at the newest event of each user; the last layer then only folds the
    other events, as in the paper's form, and gives them no update.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.aggregates = nn.ModuleList(CausalAggregate(config, number) for number in range(1, config.layers))
        self.layers = nn.ModuleList(CausalLayer(config) for _ in range(config.layers))

    def forward(
        self,
        tokens_TD: torch.Tensor,
        experts_RKD: torch.Tensor,
        layer_sums: LayerSums,
        timeline: Timeline,
        all_positions: bool,
    ) -> Depth:
        all_sums = [layer_sums]
        for aggregate, layer in zip(self.aggregates, self.layers[:-1], strict=True):
            tokens_TD, experts_RKD = layer(tokens_TD, experts_RKD, layer_sums, timeline)
            layer_sums = aggregate(tokens_TD, timeline)
            all_sums.append(layer_sums)
        if not all_positions and timeline.readings is None:
            timeline, event_E, boundary_R, new_T = timeline.newest()
            tokens_TD, experts_RKD = tokens_TD.index_select(0, new_T), experts_RKD.index_select(0, boundary_R)
            layer_sums = layer_sums.of(event_E, boundary_R)
        tokens_TD, experts_RKD = self.layers[-1](tokens_TD, experts_RKD, layer_sums, timeline)
        return Depth(tokens_TD, experts_RKD, timeline, all_sums)
