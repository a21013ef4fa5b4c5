"""Linear dispatcher attention on jagged histories: K experts gather from N events, then hand back to them.

    aggregate  out[k] = sum_j softmax_j(query[k] . key[j]) value[j]      softmax over exactly the user's events
    dispatch   out[j] = sum_k softmax_k(query[j] . key[k]) value[k]      softmax over the user's experts

Legend: B users, T events of all users, H heads, K experts, d and e head widths of keys and of values.
Scores are plain dot products: fold 1/sqrt(d) into the experts' side, which is the small one.

Cost O(T·H·K·(d+e)), memory O(T·H·(d+e+K)): no N x N tensor, no [B, longest] padding, no expert copied per event.
Paper: the two formulas (arXiv 2408.09380). Ours: exact softmax from tiles, and `groups` (see `lda_dispatch`).
"""

from __future__ import annotations

import torch

from elastic_rec.models.ops.lda import torch_tiles
from elastic_rec.models.tiles import TileLayout

__all__ = ["lda_aggregate", "lda_dispatch"]


def lda_aggregate(
    query_BHKd: torch.Tensor, key_THd: torch.Tensor, value_THe: torch.Tensor, layout: TileLayout
) -> torch.Tensor:
    """Experts attend over their user's events -> (B, H, K, e). A user without events gets zeros, never NaN.

    Passing one tensor as key and value saves a copy of it.
    """
    _check(layout, {"query_BHKd": query_BHKd}, {"key_THd": key_THd, "value_THe": value_THe})
    return torch_tiles.aggregate(query_BHKd, key_THd, value_THe, layout)


def lda_dispatch(
    query_THd: torch.Tensor, key_BHKd: torch.Tensor, value_BHKe: torch.Tensor, layout: TileLayout, groups: int = 1
) -> torch.Tensor:
    """Events attend over their user's experts -> (T, H, e).

    groups: the K keys fall into this many equal groups in order; each group has its own softmax, the outputs are added.
    """
    _check(layout, {"key_BHKd": key_BHKd, "value_BHKe": value_BHKe}, {"query_THd": query_THd})
    if key_BHKd.shape[2] % groups:
        raise ValueError(f"lda_dispatch: {key_BHKd.shape[2]} keys can't be split in {groups} equal groups")
    return torch_tiles.dispatch(query_THd, key_BHKd, value_BHKe, layout, groups)


def _check(layout: TileLayout, users: dict[str, torch.Tensor], events: dict[str, torch.Tensor]) -> None:
    for tensors, dim, rows, what in ((users, 4, layout.num_users, "users"), (events, 3, layout.num_tokens, "events")):
        for name, tensor in tensors.items():
            if tensor.dim() != dim or tensor.shape[0] != rows:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {dim} dimensions and {rows} rows, "
                    f"the layout's {what}: build the layout from the offsets of these very events"
                )
