"""Aggregate and dispatch as batched matrix products over tiles; any device, gradients by autograd.

Each tile works with its own user's experts, so copying experts costs T/C · K · d, not T · K · d. For aggregate a
tile gives a partial sum; the partial sums of a user are added up under one maximum per user and expert, which makes
the softmax exact over the user's events and over nothing else.
"""

from __future__ import annotations

import torch

from elastic_rec.models.tiles import TileLayout


def aggregate(
    query_BHKd: torch.Tensor, key_THd: torch.Tensor, value_THe: torch.Tensor, layout: TileLayout
) -> torch.Tensor:
    """See `lda_aggregate`."""
    B, H, K, _ = query_BHKd.shape
    e = value_THe.shape[-1]
    key_XCd = _tiles(key_THd, layout)  # X = N*H
    value_XCe = key_XCd if value_THe is key_THd else _tiles(value_THe, layout)
    query_XKd = query_BHKd.index_select(0, layout.user_N).flatten(0, 1)
    bias_XC = query_XKd.new_zeros(layout.valid_NC.shape).masked_fill_(~layout.valid_NC, -torch.inf)
    bias_X1C = bias_XC.repeat_interleave(H, dim=0)[:, None] if H > 1 else bias_XC[:, None]

    scores_XKC = torch.baddbmm(bias_X1C, query_XKd, key_XCd.transpose(1, 2))
    max_NQ = scores_XKC.detach().amax(-1).view(-1, H * K)
    max_BQ = max_NQ.new_full((B, H * K), -torch.inf)
    max_BQ = max_BQ.scatter_reduce_(0, layout.user_N[:, None].expand_as(max_NQ), max_NQ, "amax")
    # The maximum is a constant to autograd: it cancels in the quotient below, so its gradient is zero.
    weights_XKC = scores_XKC.sub_(max_BQ.index_select(0, layout.user_N).view(-1, K, 1)).exp_()

    part_NQe = torch.bmm(weights_XKC, value_XCe).view(-1, H * K, e)
    sum_BQe = part_NQe.new_zeros(B, H * K, e).index_add_(0, layout.user_N, part_NQe)
    part_NQ = weights_XKC.sum(-1).view(-1, H * K)
    norm_BQ = part_NQ.new_zeros(B, H * K).index_add_(0, layout.user_N, part_NQ)
    norm_BQ = norm_BQ + (norm_BQ == 0)  # no events: 0 / 1 and not 0 / 0, forward and backward
    return (sum_BQe / norm_BQ[..., None]).view(B, H, K, e)


def dispatch(
    query_THd: torch.Tensor, key_BHKd: torch.Tensor, value_BHKe: torch.Tensor, layout: TileLayout, groups: int
) -> torch.Tensor:
    """See `lda_dispatch`."""
    _, H, K, e = value_BHKe.shape
    N, C = layout.valid_NC.shape
    query_XCd = _tiles(query_THd, layout)  # X = N*H
    key_XKd = key_BHKd.index_select(0, layout.user_N).flatten(0, 1)
    value_XKe = value_BHKe.index_select(0, layout.user_N).flatten(0, 1)
    # Experts before events: the softmax then runs down columns and vectorises (8 experts: half the op's time on a CPU).
    scores_XKC = torch.bmm(key_XKd, query_XCd.transpose(1, 2))
    weights_XKC = scores_XKC.view(-1, groups, K // groups, C).softmax(2).view(-1, K, C)
    out_NCHe = torch.bmm(weights_XKC.transpose(1, 2), value_XKe).view(N, H, C, e).transpose(1, 2)
    return layout.to_tokens(out_NCHe)


def _tiles(x_THd: torch.Tensor, layout: TileLayout) -> torch.Tensor:
    """(T, H, d) -> (N*H, C, d)."""
    return layout.to_tiles(x_THd).transpose(1, 2).flatten(0, 1)
