"""Softmax losses over items: the whole catalogue, or a sample with logQ correction.

Legend: R rows (prefixes), D width, C candidates, S shared negatives.
Products may run in bfloat16 (autocast); what follows on the logits is float32. Both give (sum of weight · cross
entropy, cross entropy per row without graph). A row of weight 0 (padding, no target) may have any target; its cross
entropy stays finite and counts nothing.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import nn

from elastic_rec.models.ops.linear_cross_entropy import linear_cross_entropy

FIRST_ITEM = 2  # ids 0 and 1 are padding and "unknown"; never candidates


class SoftmaxKind(StrEnum):
    """Over which items the cross entropy runs."""

    full = "full"
    sampled = "sampled"


class FullSoftmax(nn.Module):
    """Cross entropy over all items. Candidates: ids FIRST_ITEM..V-1 in ascending order."""

    def forward(self, query_RD, candidate_CD, candidate_ids_C, targets_R, log_q_C, weights_R):
        return linear_cross_entropy(query_RD, candidate_CD, (targets_R - FIRST_ITEM).clamp_min(0), weights_R)


class SampledSoftmax(nn.Module):
    """Cross entropy of the target against S negatives that all rows of the step share.

    Candidates: [S negatives ; the R targets, in the order of the rows]. Row r sees the negatives, except those equal to
    its target, and its own target. A negative's logit is lowered by its log_q, the log of how often the sampler is
    expected to draw it, so each other item's expected share of the sum is its share in the full one, and the sum is
    unbiased (importance sampling, Bengio & Senecal 2008). The target is in the sum for certain, hence uncorrected:
    lowering it too, as is common, doesn't tend to the full softmax as S grows.
    """

    def forward(self, query_RD, candidate_CD, candidate_ids_C, targets_R, log_q_C, weights_R):
        num_negatives = candidate_ids_C.numel() - query_RD.shape[0]
        if num_negatives < 1:
            raise ValueError(
                f"{candidate_ids_C.numel()} candidates for {query_RD.shape[0]} rows: sampled softmax needs "
                "[negatives ; one target per row] with at least one negative"
            )
        negative_SD, target_RD = candidate_CD[:num_negatives], candidate_CD[num_negatives:]
        negative_RS = (query_RD @ negative_SD.T).float() - log_q_C[:num_negatives]
        hits_RS = candidate_ids_C[:num_negatives] == targets_R[:, None]
        target_R = (query_RD.float() * target_RD).sum(-1)
        logits = torch.cat([target_R[:, None], negative_RS.masked_fill(hits_RS, -torch.inf)], dim=1)
        loss_R = logits.logsumexp(-1) - target_R
        return (weights_R * loss_R).sum(), loss_R.detach()


SOFTMAX = {SoftmaxKind.full: FullSoftmax, SoftmaxKind.sampled: SampledSoftmax}
