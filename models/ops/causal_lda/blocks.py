"""Run a function over blocks of chunks, and once more in backward, so that nothing inside it is kept in between.

Each argument says how a block gets its piece (shapes: G chunks of the block, C events per chunk):

    SHARED    the tensor itself                               gradient: summed over blocks
    CHUNK     rows of the block's chunks               (G, ...)
    OWN       the events of each chunk              (G, C, ...)  padding repeats the user's last event
    PREVIOUS  the events of the chunk before        (G, C, ...)  without one: the chunk's own events; mask them

and each output whether it is per CHUNK (G, ...) or OWN (G, C, ...), which comes back per event. All moves of events,
forward and backward, are gathers from contiguous stretches: no atomics, and the same bits every run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum

import torch
from torch.autograd.function import once_differentiable

from elastic_rec.models.ops.causal_lda.chunks import Block, Chunks


class Kind(Enum):
    SHARED, CHUNK, OWN, PREVIOUS = range(4)


def run_blocks(
    body: Callable[..., Sequence[torch.Tensor]],
    chunks: Chunks,
    arguments: Sequence[tuple[Kind, torch.Tensor]],
    outputs: Sequence[tuple[Kind, Sequence[int], torch.dtype]],
) -> tuple[torch.Tensor, ...]:
    """outputs: kind, shape behind the row axis, dtype. body takes the pieces in order and gives one tensor each."""
    kinds = [kind for kind, _ in arguments]
    return _Blocked.apply(body, chunks, kinds, outputs, *(tensor for _, tensor in arguments))


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, body, chunks, kinds, outputs, *tensors):
        ctx.body, ctx.chunks, ctx.kinds, ctx.outputs = body, chunks, kinds, outputs
        ctx.save_for_backward(*tensors)
        rows = {Kind.CHUNK: chunks.tiles.user_N.numel(), Kind.OWN: chunks.tiles.num_tokens}
        device = chunks.before_N.device
        full = [torch.empty(rows[kind], *shape, dtype=dtype, device=device) for kind, shape, dtype in outputs]
        # Types are decided by the arguments, so that backward's second run is the same computation as the first.
        with torch.autocast(device.type, enabled=False):
            for block in chunks.blocks:
                pieces = [_take(chunks, kind, tensor, block) for kind, tensor in zip(kinds, tensors, strict=True)]
                for (kind, *_), out, piece in zip(outputs, full, body(*pieces), strict=True):
                    if kind is Kind.CHUNK:
                        out[block.first : block.end] = piece
                    else:
                        slots = chunks.tiles.slot_T[block.first_token : block.end_token] - block.first * chunks.chunk
                        out[block.first_token : block.end_token] = piece.flatten(0, 1).index_select(0, slots)
        return tuple(full)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        chunks, kinds, tensors, wanted = ctx.chunks, ctx.kinds, ctx.saved_tensors, ctx.needs_input_grad[4:]
        full = [torch.zeros_like(tensor) if want else None for tensor, want in zip(tensors, wanted, strict=True)]
        with torch.autocast(chunks.before_N.device.type, enabled=False):
            for block in chunks.blocks:
                pieces = [
                    _take(chunks, kind, tensor, block).detach().requires_grad_(want)
                    for kind, tensor, want in zip(kinds, tensors, wanted, strict=True)
                ]
                with torch.enable_grad():
                    results = ctx.body(*pieces)
                results, grads_of = zip(
                    *(
                        (result, _take_grad(chunks, kind, grad, block))
                        for (kind, *_), result, grad in zip(ctx.outputs, results, grads, strict=True)
                        if result.requires_grad
                    ),
                    strict=True,
                )
                leaves = [piece for piece, want in zip(pieces, wanted, strict=True) if want]
                found = iter(torch.autograd.grad(results, leaves, grads_of))
                for kind, out in zip(kinds, full, strict=True):
                    if out is not None:
                        _add_grad(chunks, kind, out, next(found), block)
        return None, None, None, None, *full


def _take(chunks: Chunks, kind: Kind, tensor: torch.Tensor, block: Block) -> torch.Tensor:
    if kind is Kind.SHARED:
        return tensor
    if kind is Kind.CHUNK:
        return tensor[block.first : block.end]
    token_NC = chunks.tiles.token_NC.view(-1, chunks.chunk)
    if kind is Kind.OWN:
        token_GC = token_NC[block.first : block.end]
    else:
        token_GC = token_NC.index_select(0, chunks.previous_N[block.first : block.end])
    return tensor.index_select(0, token_GC.reshape(-1)).view(*token_GC.shape, *tensor.shape[1:])


def _take_grad(chunks: Chunks, kind: Kind, grad: torch.Tensor, block: Block) -> torch.Tensor:
    grad = _take(chunks, kind, grad, block)
    if kind is Kind.CHUNK:
        return grad
    padding_GC = ~chunks.tiles.valid_NC[block.first : block.end]
    return grad.masked_fill_(padding_GC.view(*padding_GC.shape, *[1] * (grad.dim() - 2)), 0.0)


def _add_grad(chunks: Chunks, kind: Kind, out: torch.Tensor, grad: torch.Tensor, block: Block) -> None:
    """Add a piece's gradient to the whole argument's. Copies in padding slots were masked by body: nothing is lost."""
    if kind is Kind.SHARED:
        out += grad
    elif kind is Kind.CHUNK:
        out[block.first : block.end] += grad
    else:
        first, start, end = block.first, block.first_token, block.end_token
        if kind is Kind.PREVIOUS:
            missing_G = ~chunks.has_previous_N[first : block.end]
            grad = grad.masked_fill(missing_G.view(-1, *[1] * (grad.dim() - 1)), 0.0)
            first, start, end = first - 1, block.previous_first_token, block.previous_end_token
        slots = chunks.tiles.slot_T[start:end] - first * chunks.chunk
        out[start:end] += grad.flatten(0, 1).index_select(0, slots)
