"""Mean and covariance of a user's events, as running sums: what target attention is to first order (ours).

Target attention over N events reads sum_n softmax_n(q · k_n) v_n. For small scores, exp(s) = 1 + s, that is

    mean(v) + Cov(v, k) q          Cov(v, k) = mean(v k^T) - mean(v) mean(k)^T

so a candidate reads a history of any length off a matrix of fixed size. v: the events as the tower was given them;
k = P v, P learned, begins with orthonormal rows.

Legend: B users, T new events, E = T + events kept in states, N chunks of C of them, R boundaries, D width,
r = config.moments directions, f = D + 1. Sums hold (P v, 1) (v, 1)^T: (r + 1, D + 1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from elastic_rec.models.ops.causal_lda.scan import linear_scan
from elastic_rec.models.towers.config import TowerConfig
from elastic_rec.models.towers.elastic.timeline import Timeline


class Moments(NamedTuple):
    """mean (B, D) of the events; covariance (B, r, D) of P v and v. Zeros where there is no event."""

    mean: torch.Tensor
    covariance: torch.Tensor


class RunningMoments(nn.Module):
    """forward(tokens_TD, timeline) -> sums of all events of each user (B, r+1, D+1), or of those that each reading sees
    (I, r+1, D+1). A state's sums have all of its events, so
    those it keeps one by one count as nothing here."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        rank = config.moments
        self.key_rD = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, config.width))) if rank else None

    def sums(self, tokens_XCD: torch.Tensor, counts_XC: torch.Tensor) -> torch.Tensor:
        """Of each row of C events, those that count: (X, r+1, D+1), in float32 or wider."""
        wide = torch.promote_types(torch.float32, tokens_XCD.dtype)
        with torch.autocast(tokens_XCD.device.type, enabled=False):
            counts_XC1 = counts_XC[..., None].to(wide)
            value_XCD = tokens_XCD.to(wide).masked_fill(~counts_XC[..., None], 0.0)
            key_XCr = counts_XC1
            if self.key_rD is not None:
                key_XCr = torch.cat([F.linear(value_XCD, self.key_rD.to(wide)), counts_XC1], dim=-1)
            key_XrC = key_XCr.transpose(1, 2)
            return torch.cat([torch.bmm(key_XrC, value_XCD), torch.bmm(key_XrC, counts_XC1)], dim=-1)

    def forward(self, tokens_TD: torch.Tensor, timeline: Timeline) -> torch.Tensor:
        tiles, D = timeline.chunks.tiles, tokens_TD.shape[1]
        counts_NC, start_Brf = tiles.valid_NC, None
        if timeline.state is not None:
            kept_BW = timeline.state.times_s_BW
            start_Brf, new_T = timeline.state.moments_Brf, counts_NC.new_ones(tokens_TD.shape[0])
            is_new_E = timeline.join(torch.zeros_like(kept_BW, dtype=torch.bool), new_T)
            tokens_TD = timeline.join(tokens_TD.new_zeros(*kept_BW.shape, D), tokens_TD)
            counts_NC = counts_NC & is_new_E.index_select(0, tiles.token_NC).view(counts_NC.shape)
        tokens_NCD = tokens_TD.index_select(0, tiles.token_NC).view(*counts_NC.shape, D)
        sums_Nrf = self.sums(tokens_NCD, counts_NC)
        if start_Brf is None:
            start_Brf = sums_Nrf.new_zeros(timeline.num_users, *sums_Nrf.shape[1:])
        added_Rrf = torch.cat([start_Brf.to(sums_Nrf.dtype), sums_Nrf]).index_select(0, timeline.chunks.source_R)
        no_decay_Rr = added_Rrf.new_zeros(added_Rrf.shape[:2], dtype=torch.float64)
        sums_Rrf = linear_scan(added_Rrf, no_decay_Rr, timeline.chunks)
        if (at := timeline.readings) is None:
            return sums_Rrf.index_select(0, timeline.chunks.end_B)
        return sums_Rrf.index_select(0, at.boundary_I) + self.sums(tokens_TD[at.event_IC], at.seen_IC)


def moments_of(sums_Xrf: torch.Tensor) -> Moments:
    """Running sums (X, r+1, D+1) -> mean (X, D) and covariance (X, r, D); zeros where nothing was summed."""
    mean_Xrf = sums_Xrf / sums_Xrf[:, -1:, -1:].clamp_min(1.0)
    mean_XD, key_Xr = mean_Xrf[:, -1, :-1], mean_Xrf[:, :-1, -1]
    return Moments(mean_XD, mean_Xrf[:, :-1, :-1] - key_Xr[:, :, None] * mean_XD[:, None])
