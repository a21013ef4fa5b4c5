"""A linear recurrence over the boundaries of each user, in log2(longest) vectorised steps.

    y_r = e^(log_decay_r) · y_(r-1) + x_r        y starts from x at a user's first boundary

Decays stay logarithms in float64 and are added, never multiplied: 10^5 of them lose no digits, and one that vanishes
does so by rounding to 0. The backward pass is the same recurrence run from the other end; only y is kept for it.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from elastic_rec.models.ops.causal_lda.chunks import Chunks


def running_max(x_RQ: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """Largest x so far, per user and column. No gradient."""
    x_RQ = x_RQ.detach()
    for shift in _shifts(chunks):
        x_RQ = torch.maximum(x_RQ, x_RQ.index_select(0, _back(chunks, shift)))
    return x_RQ


def linear_scan(x_RQe: torch.Tensor, log_decay_RQ: torch.Tensor, chunks: Chunks) -> torch.Tensor:
    """log_decay_RQ float64, at most 0; values at users' first boundaries don't matter."""
    return _LinearScan.apply(x_RQe, log_decay_RQ, chunks)


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RQe, log_decay_RQ, chunks):
        is_first_R1 = (_rows(chunks) == chunks.first_R)[:, None]
        log_decay_RQ = log_decay_RQ.masked_fill(is_first_R1, -torch.inf)
        y_RQe = _accumulate(x_RQe, log_decay_RQ, chunks, _back)
        ctx.chunks = chunks
        ctx.save_for_backward(y_RQe, log_decay_RQ)
        return y_RQe

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RQe):
        (y_RQe, log_decay_RQ), chunks = ctx.saved_tensors, ctx.chunks
        is_last_R1 = (_rows(chunks) == chunks.last_R)[:, None]
        ahead_RQ = log_decay_RQ.index_select(0, _ahead(chunks, 1)).masked_fill(is_last_R1, -torch.inf)
        grad_x_RQe = _accumulate(grad_RQe, ahead_RQ, chunks, _ahead)
        before_RQe = y_RQe.index_select(0, _back(chunks, 1))
        grad_decay_RQ = (grad_x_RQe * before_RQe).sum(-1).to(log_decay_RQ.dtype) * log_decay_RQ.exp()
        return grad_x_RQe, grad_decay_RQ, None


def _accumulate(x_RQe, log_decay_RQ, chunks, neighbour):
    """Hillis and Steele's scan. At a user's edge the decay is e^-inf = 0 and the neighbour is clamped to the user's own
    rows, so nothing of a stranger, not even a NaN, gets in; further steps then change no bit of a shorter user."""
    for shift in _shifts(chunks):
        index_R = neighbour(chunks, shift)
        decay_RQ1 = log_decay_RQ.exp().to(x_RQe.dtype)[..., None]
        x_RQe = torch.addcmul(x_RQe, decay_RQ1, x_RQe.index_select(0, index_R))
        log_decay_RQ = log_decay_RQ + log_decay_RQ.index_select(0, index_R)
    return x_RQe


def _shifts(chunks: Chunks) -> list[int]:
    return [2**step for step in range(chunks.steps)]


def _rows(chunks: Chunks) -> torch.Tensor:
    return torch.arange(chunks.num_boundaries, device=chunks.first_R.device)


def _back(chunks: Chunks, shift: int) -> torch.Tensor:
    return torch.maximum(_rows(chunks) - shift, chunks.first_R)


def _ahead(chunks: Chunks, shift: int) -> torch.Tensor:
    return torch.minimum(_rows(chunks) + shift, chunks.last_R)
