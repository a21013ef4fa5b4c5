"""The definition of aggregate and dispatch: one user at a time, plain softmax. Slow; the judge of every fast form."""

from __future__ import annotations

import torch


def aggregate(
    query_BHKd: torch.Tensor, key_THd: torch.Tensor, value_THe: torch.Tensor, offsets_B1: torch.Tensor
) -> torch.Tensor:
    """See `lda_aggregate`."""
    out = []
    for b, (start, end) in enumerate(zip(offsets_B1[:-1].tolist(), offsets_B1[1:].tolist(), strict=True)):
        key_HNd = key_THd[start:end].transpose(0, 1)
        value_HNe = value_THe[start:end].transpose(0, 1)
        weights_HKN = (query_BHKd[b] @ key_HNd.transpose(1, 2)).softmax(-1)
        out.append(weights_HKN @ value_HNe)  # no events: a product over an empty axis, zeros
    return torch.stack(out)


def dispatch(
    query_THd: torch.Tensor,
    key_BHKd: torch.Tensor,
    value_BHKe: torch.Tensor,
    offsets_B1: torch.Tensor,
    groups: int = 1,
) -> torch.Tensor:
    """See `lda_dispatch`."""
    out = []
    for b, (start, end) in enumerate(zip(offsets_B1[:-1].tolist(), offsets_B1[1:].tolist(), strict=True)):
        query_HNd = query_THd[start:end].transpose(0, 1)
        scores_HNK = query_HNd @ key_BHKd[b].transpose(1, 2)
        weights_HNK = torch.cat([part.softmax(-1) for part in scores_HNK.chunk(groups, dim=-1)], dim=-1)
        out.append((weights_HNK @ value_BHKe[b]).transpose(0, 1))
    return torch.cat(out)
