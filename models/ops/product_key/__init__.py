"""Product keys: the best of n_keys^2 slots by looking at 2 n_keys sub-keys.

Slot (i, j) of a head has score query[first half] . subkey[0, i] + query[second half] . subkey[1, j] and the id
i * n_keys + j. The best r slots can only pair one of the best r first halves with one of the best r second halves,
so r^2 sums suffice. Lample et al., "Large Memory Layers with Product Keys" (arXiv 1907.05242).
"""

from __future__ import annotations

import torch

from elastic_rec.models.ops.product_key import torch_topk

__all__ = ["product_key_topk"]


def product_key_topk(
    query_QHd: torch.Tensor, subkeys_H2nh: torch.Tensor, top_r: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> slot ids (Q, H, r) int64 in [0, n_keys^2), scores (Q, H, r) in descending order.

    query_QHd: Q queries, H memory heads, d = 2 h. subkeys_H2nh: per head two sets of n_keys sub-keys of width h.
    Gradients flow through the scores to queries and sub-keys; ids have none.
    """
    heads, halves, num_keys, half = subkeys_H2nh.shape
    if halves != 2 or query_QHd.shape[1:] != (heads, 2 * half):
        raise ValueError(
            f"query_QHd {tuple(query_QHd.shape)} doesn't fit subkeys_H2nh {tuple(subkeys_H2nh.shape)}: "
            "the query needs the same heads and twice the sub-keys' width"
        )
    if not 1 <= top_r <= num_keys:
        raise ValueError(f"top_r = {top_r} must lie in 1..n_keys = {num_keys}")
    return torch_topk.topk(query_QHd, subkeys_H2nh, top_r)
