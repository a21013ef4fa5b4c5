"""Events read experts and their window: batched products per chunk, block after block, with a backward pass by hand.

Legend as in __init__; X = G*H, J = K + 2C slots: [experts ; chunk before ; own chunk]. A block's keys and values stand
together in one buffer, its weights are made again in the backward pass: only the arguments are kept for it.
Slots stand before events in scores_GHJC: the softmax then runs down columns and vectorises.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from elastic_rec.models.ops.causal_lda.chunks import Block, Chunks


def dispatch(
    qkv_T3Hd: torch.Tensor, experts_RK2Hd: torch.Tensor, bias_HW: torch.Tensor, chunks: Chunks
) -> torch.Tensor:
    """The fast form of `causal_dispatch`: see there."""
    C, K = chunks.chunk, experts_RK2Hd.shape[1]
    distance_WC = torch.arange(C, device=bias_HW.device) + C - torch.arange(2 * C, device=bias_HW.device)[:, None]
    bias_HWC = bias_HW[:, distance_WC.clamp_min(0)].masked_fill(distance_WC < 0, -torch.inf)
    bias_HJC = torch.nn.functional.pad(bias_HWC, (0, 0, K, 0)).to(qkv_T3Hd.dtype)
    experts_RK2Hd = experts_RK2Hd.to(qkv_T3Hd.dtype).contiguous()
    return _Dispatch.apply(qkv_T3Hd.contiguous(), experts_RK2Hd, bias_HJC, chunks)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv_T3Hd, experts_RK2Hd, bias_HJC, chunks):
        ctx.chunks = chunks
        ctx.save_for_backward(qkv_T3Hd, experts_RK2Hd, bias_HJC)
        out_THd = torch.empty_like(qkv_T3Hd[:, 0], memory_format=torch.contiguous_format)
        with torch.autocast(qkv_T3Hd.device.type, enabled=False):  # types are decided by the arguments
            buffer = _buffer(chunks, qkv_T3Hd, bias_HJC)
            for block in chunks.blocks:
                query_XCd, key_XJd, value_XJd = _window(chunks, block, qkv_T3Hd, experts_RK2Hd, buffer)
                weights_XJC = _weights(block, query_XCd, key_XJd, bias_HJC)
                out_XCd = torch.bmm(weights_XJC.transpose(1, 2), value_XJd)
                chunks.put(
                    block, out_THd, out_XCd.view(block.end - block.first, -1, *out_XCd.shape[1:]).transpose(1, 2)
                )
        return out_THd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THd):
        (qkv_T3Hd, experts_RK2Hd, bias_HJC), chunks = ctx.saved_tensors, ctx.chunks
        grad_THd = grad_THd.contiguous()
        grad_qkv, grad_experts = torch.empty_like(qkv_T3Hd), torch.zeros_like(experts_RK2Hd)
        grad_bias = torch.zeros_like(bias_HJC, dtype=torch.promote_types(torch.float32, bias_HJC.dtype))
        later_2HCd = None  # what the block after this one sends to this one's last chunk
        with torch.autocast(qkv_T3Hd.device.type, enabled=False):
            buffer, grad_buffer = _buffer(chunks, qkv_T3Hd, bias_HJC), _buffer(chunks, qkv_T3Hd, bias_HJC)
            for block in reversed(chunks.blocks):
                query_XCd, key_XJd, value_XJd = _window(chunks, block, qkv_T3Hd, experts_RK2Hd, buffer)
                weights_XJC = _weights(block, query_XCd, key_XJd, bias_HJC)
                grad_XCd = _grad_of_valid(chunks, block, grad_THd)
                grad_2GHJd = grad_buffer[:, : block.end - block.first]
                grad_key_XJd, grad_value_XJd = grad_2GHJd.flatten(1, 2)
                torch.bmm(weights_XJC, grad_XCd, out=grad_value_XJd)
                grad_weights_XJC = torch.bmm(value_XJd, grad_XCd.transpose(1, 2))
                grad_scores_XJC = torch.ops.aten._softmax_backward_data(
                    grad_weights_XJC, weights_XJC, 1, weights_XJC.dtype
                )
                torch.bmm(grad_scores_XJC, query_XCd, out=grad_key_XJd)
                grad_query_XCd = torch.bmm(grad_scores_XJC.transpose(1, 2), key_XJd)
                grad_bias += grad_scores_XJC.view(-1, *bias_HJC.shape).sum(0, dtype=grad_bias.dtype)
                later_2HCd = _put_grads(chunks, block, grad_2GHJd, grad_query_XCd, later_2HCd, grad_qkv, grad_experts)
        return grad_qkv, grad_experts, grad_bias.to(bias_HJC.dtype), None


def _window(chunks: Chunks, block: Block, qkv_T3Hd, experts_RK2Hd, buffer):
    """Queries (X, C, d); keys and values (X, J, d), which stand in the buffer."""
    own_GC3Hd, K, C = chunks.take(block, qkv_T3Hd), experts_RK2Hd.shape[1], chunks.chunk
    window_2GHJd = buffer[:, : block.end - block.first]
    experts_GK2Hd = experts_RK2Hd.index_select(0, chunks.before_N[block.first : block.end])
    window_2GHJd[:, :, :, :K] = experts_GK2Hd.permute(2, 0, 3, 1, 4)
    own_2GHCd, previous_2GHCd = window_2GHJd[:, :, :, K + C :], window_2GHJd[:, :, :, K : K + C]
    own_2GHCd.copy_(own_GC3Hd[:, :, 1:].permute(2, 0, 3, 1, 4))
    previous_2GHCd[:, 1:] = own_2GHCd[:, :-1]
    if block.first:
        previous_2GHCd[:, 0] = chunks.take_chunk(block.first - 1, qkv_T3Hd)[:, 1:].permute(1, 2, 0, 3)
    if block.starts_S.numel():  # finite numbers, not a stranger's: masked weights are 0, and 0 · NaN is not
        previous_2GHCd.index_fill_(1, block.starts_S, 0.0)
    query_XCd = own_GC3Hd[:, :, 0].transpose(1, 2).flatten(0, 1)
    return query_XCd, *window_2GHJd.flatten(1, 2)


def _weights(block: Block, query_XCd, key_XJd, bias_HJC):
    H, J, C = bias_HJC.shape
    scores_GHJC = torch.bmm(key_XJd, query_XCd.transpose(1, 2)).view(-1, H, J, C).add_(bias_HJC)
    if block.starts_S.numel():
        scores_GHJC[:, :, J - 2 * C : J - C].index_fill_(0, block.starts_S, -torch.inf)
    return scores_GHJC.softmax(2).flatten(0, 1)


def _grad_of_valid(chunks: Chunks, block: Block, grad_THd):
    """(X, C, d), zeros in padding slots."""
    grad_GCHd = chunks.take(block, grad_THd)
    if block.end_token - block.first_token < grad_GCHd.shape[0] * chunks.chunk:
        grad_GCHd = grad_GCHd.masked_fill_(~chunks.tiles.valid_NC[block.first : block.end, :, None, None], 0.0)
    return grad_GCHd.transpose(1, 2).flatten(0, 1)


def _put_grads(chunks: Chunks, block: Block, grad_2GHJd, grad_query_XCd, later_2HCd, grad_qkv, grad_experts):
    """Gradients of a block to their rows; returns what belongs to the last chunk of the block before."""
    C, K = chunks.chunk, grad_experts.shape[1]
    own_2GHCd, previous_2GHCd = grad_2GHJd[:, :, :, K + C :], grad_2GHJd[:, :, :, K : K + C]
    if block.starts_S.numel():
        previous_2GHCd.index_fill_(1, block.starts_S, 0.0)
    own_2GHCd[:, :-1] += previous_2GHCd[:, 1:]
    if later_2HCd is not None:
        own_2GHCd[:, -1] += later_2HCd
    before_G = chunks.before_N[block.first : block.end]
    grad_experts.index_copy_(0, before_G, grad_2GHJd[:, :, :, :K].permute(1, 3, 0, 2, 4))
    _, G, H, _, d = grad_2GHJd.shape
    grad_GC3Hd = torch.empty(G, C, 3, H, d, dtype=grad_qkv.dtype, device=grad_qkv.device)
    grad_GC3Hd[:, :, 0] = grad_query_XCd.view(G, H, C, d).transpose(1, 2)
    grad_GC3Hd[:, :, 1:] = own_2GHCd.permute(1, 3, 0, 2, 4)
    chunks.put(block, grad_qkv, grad_GC3Hd)
    return previous_2GHCd[:, 0].clone()


def _buffer(chunks: Chunks, qkv_T3Hd, bias_HJC):
    """Room for the keys and values of the largest block: (2, G, H, J, d)."""
    largest = max((block.end - block.first for block in chunks.blocks), default=0)
    H, J, _ = bias_HJC.shape
    return qkv_T3Hd.new_empty(2, largest, H, J, qkv_T3Hd.shape[-1])
