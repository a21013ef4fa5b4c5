"""Cross entropy of rows against a whole table, without the R x C matrix of logits.

    loss[r] = log sum_c exp(query[r] . table[c])  -  query[r] . table[target[r]]
    total   = sum_r weight[r] · loss[r]

Legend: R rows, C entries of the table, D width. Work O(R·C·D) in three products of the forward pass (logits, and the
gradients of both sides, which are known as soon as the logits are) and none in the backward pass; memory
O(R·D + C·D + block·C). The full logits of 13,000 rows against 3,700 items are 200 MB, written and read six times over.

Source: gradients in the forward pass as in Liger Kernel (Hsu et al. 2024); ours: plain PyTorch, any device.
"""

from __future__ import annotations

import torch

from elastic_rec.models.ops.linear_cross_entropy import torch_blocks

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    query_RD: torch.Tensor, table_CD: torch.Tensor, target_R: torch.Tensor, weight_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (total (), loss_R). Gradients run from `total` to query and table; weights are constants, loss_R has none.

    target_R: int64 in [0, C); a row of weight 0 may have any of them. Under autocast products take its dtype, softmax
    and sums stay float32 or wider. ValueError: shapes that don't fit.
    """
    R, D = query_RD.shape
    if table_CD.shape[1:] != (D,) or target_R.shape != (R,) or weight_R.shape != (R,):
        raise ValueError(
            f"queries {tuple(query_RD.shape)}, table {tuple(table_CD.shape)}, targets {tuple(target_R.shape)}, weights "
            f"{tuple(weight_R.shape)}: expected (R, D), (C, D), (R,), (R,)"
        )
    return torch_blocks.linear_cross_entropy(query_RD, table_CD, target_R, weight_R)
