"""Causal aggregate and dispatch over chunks; any device, exact gradients, no softmax kept for the backward pass.

Aggregate: each chunk gives its own (max, norm, sum); a scan over the chunks of each user brings them to one scale and
adds them up. Dispatch: one batched product of a chunk's events with [experts ; chunk before ; own chunk].
No number of position t depends on a later event, nor on how many there are: products are one per chunk, of a fixed
shape, the scan's maximum runs forward only, and masked weights are exact zeros.
"""

from __future__ import annotations

import torch

from elastic_rec.models.ops.causal_lda.blocks import Kind, run_blocks
from elastic_rec.models.ops.causal_lda.chunks import Chunks
from elastic_rec.models.ops.causal_lda.partial import Partial
from elastic_rec.models.ops.causal_lda.scan import linear_scan, running_max


def aggregate(
    query_HKd: torch.Tensor,
    key_THd: torch.Tensor,
    value_THe: torch.Tensor,
    times_s_T: torch.Tensor,
    rate_HK: torch.Tensor,
    chunks: Chunks,
    start: Partial | None,
) -> Partial:
    H, K, _ = query_HKd.shape
    B, R, e = chunks.tiles.num_users, chunks.num_boundaries, value_THe.shape[-1]
    wide = torch.promote_types(torch.float32, key_THd.dtype)
    start = start or Partial.empty(B, H, K, e, dtype=wide, device=key_THd.device)

    clock_N = times_s_T[chunks.last_of_chunk_N()]
    age_T = (clock_N[chunks.tiles.slot_T // chunks.chunk] - times_s_T).to(wide)  # exact integers before the cast
    max_NHK, part_NHKf = run_blocks(
        _chunk_partial,
        chunks,
        [
            (Kind.SHARED, query_HKd.to(wide)),
            (Kind.SHARED, rate_HK.to(wide)),
            (Kind.OWN, key_THd),
            (Kind.OWN, value_THe),
            (Kind.OWN, age_T),
            (Kind.CHUNK, chunks.tiles.valid_NC),
        ],
        [(Kind.CHUNK, (H, K), wide), (Kind.CHUNK, (H, K, e + 1), wide)],
    )

    # Boundary rows: a user's start, then what each of its chunks adds.
    order_R = torch.cat([chunks.first_B, chunks.before_N + 1]).argsort()
    clock_R = torch.cat([start.clock_R, clock_N])[order_R]
    max_RQ = torch.cat([start.max_RHK.flatten(1), max_NHK.flatten(1).double()])[order_R].detach()
    start_BHKf = torch.cat([start.sum_RHKe, start.norm_RHK[..., None]], dim=-1)
    part_RQf = torch.cat([start_BHKf, part_NHKf]).index_select(0, order_R).flatten(1, 2)

    rate_Q = rate_HK.double().flatten()
    elapsed_R1 = (clock_R - clock_R[chunks.last_R]).double()[:, None]  # at most 0: every weight as seen from the end
    total_RQ = running_max(max_RQ + elapsed_R1 * rate_Q, chunks) - (elapsed_R1 * rate_Q).detach()
    part_RQf = part_RQf * (max_RQ - total_RQ).exp().to(wide)[..., None]
    before_R = (torch.arange(R, device=clock_R.device) - 1).clamp_min(0)
    gap_R1 = (clock_R - clock_R[before_R]).double()[:, None]
    log_decay_RQ = total_RQ[before_R] - total_RQ - gap_R1 * rate_Q
    sums_RHKf = linear_scan(part_RQf, log_decay_RQ, chunks).view(R, H, K, e + 1)
    return Partial(total_RQ.view(R, H, K), sums_RHKf[..., e], sums_RHKf[..., :e], clock_R)


def dispatch(
    query_THd: torch.Tensor,
    expert_key_RHKd: torch.Tensor,
    expert_value_RHKe: torch.Tensor,
    key_THd: torch.Tensor,
    value_THe: torch.Tensor,
    bias_HW: torch.Tensor,
    chunks: Chunks,
) -> torch.Tensor:
    _, H, e = value_THe.shape
    distance_CW, own_future_CW = _distances(chunks.chunk, bias_HW.device)
    bias_HCW = bias_HW[:, distance_CW].masked_fill(own_future_CW, -torch.inf)
    (out_THe,) = run_blocks(
        _chunk_dispatch,
        chunks,
        [
            (Kind.SHARED, bias_HCW.transpose(1, 2).contiguous()),
            (Kind.OWN, query_THd),
            (Kind.CHUNK, expert_key_RHKd.index_select(0, chunks.before_N)),
            (Kind.CHUNK, expert_value_RHKe.index_select(0, chunks.before_N)),
            (Kind.PREVIOUS, key_THd),
            (Kind.PREVIOUS, value_THe),
            (Kind.OWN, key_THd),
            (Kind.OWN, value_THe),
            (Kind.CHUNK, chunks.has_previous_N),
        ],
        [(Kind.OWN, (H, e), value_THe.dtype)],
    )
    return out_THe


def _chunk_partial(query_HKd, rate_HK, key_GCHd, value_GCHe, age_GC, valid_GC):
    G, C, H, _ = key_GCHd.shape
    query_XKd = query_HKd.to(key_GCHd.dtype).expand(G, -1, -1, -1).flatten(0, 1)  # X = G*H
    scores_GHKC = torch.bmm(query_XKd, _heads(key_GCHd).transpose(1, 2)).view(G, H, -1, C).to(rate_HK.dtype)
    scores_GHKC = scores_GHKC.sub_(rate_HK[..., None] * age_GC[:, None, None])
    scores_GHKC = scores_GHKC.masked_fill_(~valid_GC[:, None, None], -torch.inf)
    max_GHK = scores_GHKC.detach().amax(-1)  # any constant would do: it cancels when a sum is divided by its norm
    weights_GHKC = scores_GHKC.sub_(max_GHK[..., None]).exp_()
    sum_XKe = torch.bmm(weights_GHKC.flatten(0, 1), _heads(value_GCHe).to(weights_GHKC.dtype))
    return max_GHK, torch.cat([sum_XKe.view(G, H, -1, sum_XKe.shape[-1]), weights_GHKC.sum(-1, keepdim=True)], dim=-1)


def _chunk_dispatch(
    bias_HWC, query, expert_key, expert_value, prev_key, prev_value, own_key, own_value, has_previous_G
):
    G, C, H, _ = query.shape
    K = expert_key.shape[2]
    key_XJd = torch.cat([expert_key.flatten(0, 1).to(own_key.dtype), _heads(prev_key), _heads(own_key)], dim=1)
    value_XJe = torch.cat(
        [expert_value.flatten(0, 1).to(own_value.dtype), _heads(prev_value), _heads(own_value)], dim=1
    )
    # Keys before events: the softmax then runs down columns and vectorises.
    scores_GHJC = torch.bmm(key_XJd, _heads(query).transpose(1, 2)).view(G, H, -1, C)
    scores_GHJC = scores_GHJC.to(bias_HWC.dtype)
    scores_GHJC[:, :, K:].add_(bias_HWC)
    scores_GHJC[:, :, K : K + C].masked_fill_(~has_previous_G[:, None, None, None], -torch.inf)
    weights_XJC = scores_GHJC.softmax(2).to(value_XJe.dtype).flatten(0, 1)
    out_XCe = torch.bmm(weights_XJC.transpose(1, 2), value_XJe)
    return (out_XCe.view(G, H, C, -1).transpose(1, 2),)


def _heads(x_GCHd: torch.Tensor) -> torch.Tensor:
    """(G, C, H, d) -> (G*H, C, d)."""
    return x_GCHd.transpose(1, 2).flatten(0, 1)


def _distances(chunk: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Events between position C of a chunk and slot W of [chunk before ; own chunk], and which slots are later."""
    distance_CW = torch.arange(chunk, device=device)[:, None] + chunk - torch.arange(2 * chunk, device=device)
    return distance_CW.clamp_min(0), distance_CW < 0
