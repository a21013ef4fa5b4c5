"""The definition of product-key retrieval: all n_keys^2 sums, then the best r."""

from __future__ import annotations

import torch


def topk(query_QHd: torch.Tensor, subkeys_H2nh: torch.Tensor, top_r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: scores of all n_keys^2 pairs."""
    first_QHh, second_QHh = query_QHd.chunk(2, dim=-1)
    first_QHn = torch.einsum("qhd,hnd->qhn", first_QHh, subkeys_H2nh[:, 0])
    second_QHn = torch.einsum("qhd,hnd->qhn", second_QHh, subkeys_H2nh[:, 1])
    all_QHM = (first_QHn[..., :, None] + second_QHn[..., None, :]).flatten(-2)
    scores_QHr, slot_ids_QHr = all_QHM.topk(top_r, dim=-1)
    return slot_ids_QHr, scores_QHr
