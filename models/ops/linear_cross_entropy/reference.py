"""The definition: all logits at once, gradients by autograd."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def linear_cross_entropy(
    query_RD: torch.Tensor, table_CD: torch.Tensor, target_R: torch.Tensor, weight_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, with all logits at once."""
    loss_R = F.cross_entropy(query_RD @ table_CD.T, target_R, reduction="none")
    return (weight_R * loss_R).sum(), loss_R.detach()
