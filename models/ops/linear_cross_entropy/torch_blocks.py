"""Block after block of rows: logits, softmax, and at once the gradients, while the block is in a CPU's cache."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

BLOCK_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 25}  # logits of a block: 4 MiB fit a CPU core's share of the cache


def linear_cross_entropy(query_RD, table_CD, target_R, weight_R):
    """The fast form: logits in blocks, made again for the backward pass."""
    device = query_RD.device.type
    dtype = query_RD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _LinearCrossEntropy.apply(query_RD, table_CD, target_R, weight_R, dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_RD, table_CD, target_R, weight_R, dtype):
        R, C = query_RD.shape[0], table_CD.shape[0]
        wide = torch.promote_types(torch.float32, query_RD.dtype)
        wants_grad = any(ctx.needs_input_grad[:2])
        grad_query_RD = torch.empty_like(query_RD) if wants_grad else None
        grad_table_CD = torch.zeros_like(table_CD, dtype=wide) if wants_grad else None
        loss_R = torch.empty(R, dtype=wide, device=query_RD.device)
        table = table_CD.detach().to(dtype)
        block = max(1, BLOCK_LOGITS.get(query_RD.device.type, 1 << 20) // C)
        # Gradients are computed here with these very types, so autocast must not change them on the way.
        with torch.autocast(query_RD.device.type, enabled=False):
            for start in range(0, R, block):
                rows = slice(start, start + block)
                query, target_X1, weight_X1 = query_RD[rows].to(dtype), target_R[rows, None], weight_R[rows, None]
                logits_XC = (query @ table.T).to(wide)
                chosen_X1 = logits_XC.gather(1, target_X1)
                if not wants_grad:
                    loss_R[rows] = (logits_XC.logsumexp(1, keepdim=True) - chosen_X1).squeeze(1)
                    continue
                largest_X1 = logits_XC.amax(1, keepdim=True)
                grad_XC = torch.softmax(logits_XC, 1, out=logits_XC)
                # The largest probability is e^0 / norm: so the norm costs no second pass of exponentials.
                log_norm_X1 = largest_X1 - grad_XC.amax(1, keepdim=True).log()
                loss_R[rows] = (log_norm_X1 - chosen_X1).squeeze(1)
                grad_XC = grad_XC.mul_(weight_X1).scatter_add_(1, target_X1, -weight_X1.to(wide)).to(dtype)
                grad_query_RD[rows] = grad_XC @ table
                if dtype is wide:
                    grad_table_CD.addmm_(grad_XC.T, query)
                else:
                    grad_table_CD += grad_XC.T @ query
        ctx.save_for_backward(grad_query_RD, grad_table_CD)
        ctx.table_dtype = table_CD.dtype
        ctx.mark_non_differentiable(loss_R)
        return (weight_R * loss_R).sum(), loss_R

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        grad_query_RD, grad_table_CD = ctx.saved_tensors
        return grad_query_RD * grad, (grad_table_CD * grad).to(ctx.table_dtype), None, None, None
