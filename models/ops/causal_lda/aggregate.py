"""Events into running sums: each chunk gives its own (max, norm, sum), a scan over a user's chunks adds them up.

Legend as in __init__. No number of a boundary depends on a later event, nor on how many there are: products are per
chunk, the scan's maximum runs forward only, and masked weights are exact zeros.
A chunk's weights are made again in the backward pass: only the arguments are kept for it.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from elastic_rec.models.ops.causal_lda.chunks import Block, Chunks
from elastic_rec.models.ops.causal_lda.partial import Partial
from elastic_rec.models.ops.causal_lda.scan import linear_scan, running_max


def aggregate(
    expert_query_HKd: torch.Tensor,
    qkv_T3Hd: torch.Tensor,
    times_s_T: torch.Tensor,
    decay_per_s_HK: torch.Tensor,
    chunks: Chunks,
    start: Partial | None,
) -> Partial:
    """The fast form of `causal_aggregate`: see there."""
    H, K, d = expert_query_HKd.shape
    B, R = chunks.tiles.num_users, chunks.num_boundaries
    wide = torch.promote_types(torch.float32, qkv_T3Hd.dtype)
    start = start or Partial.empty(B, H, K, d, dtype=wide, device=qkv_T3Hd.device)

    clock_N = times_s_T[chunks.last_of_chunk_N()]
    age_NC = (clock_N[:, None] - times_s_T[chunks.tiles.token_NC].view(-1, chunks.chunk)).to(
        wide
    )  # exact until the cast
    max_NHK, part_NHKf = _ChunkSums.apply(
        qkv_T3Hd.contiguous(), expert_query_HKd.to(wide), decay_per_s_HK.to(wide), age_NC, chunks
    )

    clock_R = torch.cat([start.clock_R, clock_N])[chunks.source_R]
    max_RQ = torch.cat([start.max_RHK.flatten(1), max_NHK.flatten(1).double()])[chunks.source_R].detach()
    start_BHKf = torch.cat([start.sum_RHKe, start.norm_RHK[..., None]], dim=-1)
    part_RQf = torch.cat([start_BHKf, part_NHKf]).index_select(0, chunks.source_R).flatten(1, 2)

    decay_Q = decay_per_s_HK.double().flatten()
    elapsed_R1 = (clock_R - clock_R[chunks.last_R]).double()[:, None]  # at most 0: every weight as seen from the end
    total_RQ = running_max(max_RQ + elapsed_R1 * decay_Q, chunks) - (elapsed_R1 * decay_Q).detach()
    part_RQf = part_RQf * (max_RQ - total_RQ).exp().to(wide)[..., None]
    before_R = (torch.arange(R, device=clock_R.device) - 1).clamp_min(0)
    gap_R1 = (clock_R - clock_R[before_R]).double()[:, None]
    log_decay_RQ = total_RQ[before_R] - total_RQ - gap_R1 * decay_Q
    sums_RHKf = linear_scan(part_RQf, log_decay_RQ, chunks).view(R, H, K, d + 1)
    return Partial(total_RQ.view(R, H, K), sums_RHKf[..., d], sums_RHKf[..., :d], clock_R)


class _ChunkSums(torch.autograd.Function):
    """-> max (N, H, K), any constant as far as gradients go; [sum ; norm] (N, H, K, d+1), both of exp(score - max)."""

    @staticmethod
    def forward(ctx, qkv_T3Hd, expert_query_HKd, decay_per_s_HK, age_NC, chunks):
        ctx.chunks = chunks
        ctx.save_for_backward(qkv_T3Hd, expert_query_HKd, decay_per_s_HK, age_NC)
        N, (H, K, d) = age_NC.shape[0], expert_query_HKd.shape
        max_NHK = torch.empty(N, H, K, dtype=expert_query_HKd.dtype, device=expert_query_HKd.device)
        part_NHKf = torch.empty(N, H, K, d + 1, dtype=expert_query_HKd.dtype, device=expert_query_HKd.device)
        with torch.autocast(qkv_T3Hd.device.type, enabled=False):
            query_DQ = _block_diagonal(expert_query_HKd)
            for block in chunks.blocks:
                rows = slice(block.first, block.end)
                _, value_GCHd, weights_GCHK = _weights(
                    chunks, block, qkv_T3Hd, query_DQ, decay_per_s_HK, age_NC, max_NHK[rows]
                )
                part_NHKf[rows, ..., d] = weights_GCHK.sum(1)
                for h in range(H):
                    part_NHKf[rows, h, :, :d] = torch.bmm(weights_GCHK[:, :, h].transpose(1, 2), value_GCHd[:, :, h])
        ctx.mark_non_differentiable(max_NHK)
        return max_NHK, part_NHKf

    @staticmethod
    @once_differentiable
    def backward(ctx, _, grad_NHKf):
        (qkv_T3Hd, expert_query_HKd, decay_per_s_HK, age_NC), chunks = ctx.saved_tensors, ctx.chunks
        H, K, d = expert_query_HKd.shape
        grad_qkv, grad_decay = torch.empty_like(qkv_T3Hd), torch.zeros_like(decay_per_s_HK)
        with torch.autocast(qkv_T3Hd.device.type, enabled=False):
            query_DQ = _block_diagonal(expert_query_HKd)
            grad_query_DQ = torch.zeros_like(query_DQ)
            for block in chunks.blocks:
                rows, G = slice(block.first, block.end), block.end - block.first
                max_GHK = decay_per_s_HK.new_empty(G, H, K)
                key_XD, value_GCHd, weights_GCHK = _weights(
                    chunks, block, qkv_T3Hd, query_DQ, decay_per_s_HK, age_NC, max_GHK
                )
                grad_GHKf = grad_NHKf[rows]
                grad_GC3Hd = qkv_T3Hd.new_empty(G, chunks.chunk, 3, H, d)
                grad_GC3Hd[:, :, 0] = 0.0
                grad_scores_GCHK = torch.empty_like(weights_GCHK)
                for h in range(H):
                    grad_GKd = grad_GHKf[:, h, :, :d]
                    grad_GC3Hd[:, :, 2, h] = torch.bmm(weights_GCHK[:, :, h], grad_GKd)
                    grad_scores_GCHK[:, :, h] = torch.bmm(value_GCHd[:, :, h], grad_GKd.transpose(1, 2))
                grad_scores_GCHK = grad_scores_GCHK.add_(grad_GHKf[:, None, ..., d]).mul_(weights_GCHK)
                grad_XQ = grad_scores_GCHK.flatten(0, 1).flatten(1)
                grad_GC3Hd[:, :, 1] = (grad_XQ @ query_DQ.T).view(G, chunks.chunk, H, d)
                grad_query_DQ.addmm_(key_XD.T.to(grad_XQ.dtype), grad_XQ)
                grad_decay -= (age_NC[rows].reshape(1, -1) @ grad_XQ).view(H, K)
                chunks.put(block, grad_qkv, grad_GC3Hd)
        grad_ask_HdHK = grad_query_DQ.view(H, d, H, K)
        grad_ask = torch.stack([grad_ask_HdHK[h, :, h].T for h in range(H)])
        return grad_qkv, grad_ask, grad_decay, None, None


def _weights(chunks: Chunks, block: Block, qkv_T3Hd, query_DQ, decay_per_s_HK, age_NC, max_GHK):
    """-> key (G*C, D), value (G, C, H, d) in ask's type, weights (G, C, H, K); fills max_GHK."""
    rows, (H, K) = slice(block.first, block.end), decay_per_s_HK.shape
    own_GC3Hd = chunks.take(block, qkv_T3Hd)
    key_XD = own_GC3Hd[:, :, 1].flatten(0, 1).flatten(1)
    scores_GCHK = (key_XD @ query_DQ.to(key_XD.dtype)).to(query_DQ.dtype).view(*own_GC3Hd.shape[:2], H, K)
    scores_GCHK = scores_GCHK.sub_(age_NC[rows, :, None, None] * decay_per_s_HK)
    if block.end_token - block.first_token < age_NC[rows].numel():
        scores_GCHK = scores_GCHK.masked_fill_(~chunks.tiles.valid_NC[rows, :, None, None], -torch.inf)
    max_GHK.copy_(scores_GCHK.flatten(2).max(1).values.view(max_GHK.shape))  # amax takes twice as long on a CPU
    return key_XD, own_GC3Hd[:, :, 2].to(query_DQ.dtype), scores_GCHK.sub_(max_GHK[:, None]).exp_()


def _block_diagonal(expert_query_HKd: torch.Tensor) -> torch.Tensor:
    """(H*d, H*K): one product of unsplit keys with it gives every head's scores."""
    return torch.block_diag(*expert_query_HKd.transpose(1, 2))
