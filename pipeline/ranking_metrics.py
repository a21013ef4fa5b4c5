"""AUC, GAUC, normalised entropy, calibration and NDCG per request, from the scores of all candidates of a stage.

Legend: C candidates. Sums of a batch would do for entropy and calibration, but AUC and its kin need all scores at once:
five numbers per candidate and label, gathered on every rank.

    auc           share of (positive, negative) pairs in the right order, a tie counts half
    gauc          the same within each user who has both, weighted by his candidates
    ne            cross entropy / that of always saying the mean label (torchrec.metrics.ne)
    calibration   sum of predictions / sum of labels (torchrec.metrics.calibration)
    ndcg          of each impression with a positive, gains 0 and 1, ties in the order shown; mean over impressions
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from torchrec.metrics.calibration import compute_calibration
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

from elastic_rec.pipeline.world import World

EPSILON = 1e-12


@dataclass
class Scored:
    """(C,) each: logit, label of one task; user row, impression row, events the impression saw."""

    logit: np.ndarray
    label: np.ndarray
    user: np.ndarray
    impression: np.ndarray
    seen: np.ndarray

    def where(self, keep: np.ndarray) -> Scored:
        return Scored(*(getattr(self, field.name)[keep] for field in fields(self)))


def grouped_auc(logit: np.ndarray, label: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC of each group that has a positive and a negative, and how many candidates it has."""
    order = np.lexsort((logit, group))
    logit, label, group = logit[order], label[order] > 0.5, group[order]
    first = np.flatnonzero(np.append(True, group[1:] != group[:-1]))
    sizes = np.diff(np.append(first, len(group)))
    tie = np.flatnonzero(np.append(True, (group[1:] != group[:-1]) | (logit[1:] != logit[:-1])))
    tied = np.diff(np.append(tie, len(group)))
    rank = np.repeat(tie + (tied - 1) / 2, tied) - np.repeat(first, sizes)  # 0-based, the mean of equal ones
    positives = np.add.reduceat(label.astype(np.int64), first)
    negatives = sizes - positives
    wins = np.add.reduceat(np.where(label, rank, 0.0), first) - positives * (positives - 1) / 2
    both = (positives > 0) & (negatives > 0)
    return wins[both] / (positives * negatives)[both], sizes[both]


def ndcg(logit: np.ndarray, label: np.ndarray, request: np.ndarray) -> np.ndarray:
    """NDCG of each request with at least one positive; candidates come in the order they were shown."""
    gains = []
    for score in (logit, label):
        order = np.lexsort((np.arange(len(label)), -score, request))
        first = np.flatnonzero(np.append(True, request[order][1:] != request[order][:-1]))
        place = np.arange(len(label)) - np.repeat(first, np.diff(np.append(first, len(label))))
        gains.append(np.add.reduceat((label[order] > 0.5) / np.log2(place + 2), first))
    found, ideal = gains
    return found[ideal > 0] / ideal[ideal > 0]


def figures_of(scored: Scored) -> dict[str, float | int]:
    """Figures that cannot be computed (one class only) are left out."""
    figures: dict[str, float | int] = {"candidates": len(scored.label)}
    if not len(scored.label):
        return figures
    prediction, label = torch.sigmoid(torch.from_numpy(scored.logit).double()), torch.from_numpy(scored.label).double()
    weight = torch.ones_like(label)
    entropy = compute_cross_entropy(label, prediction, weight, EPSILON).sum()
    figures["log_loss"] = float(entropy) * math.log(2) / len(label)  # torchrec counts in bits
    positives = label.sum()
    if 0 < positives < len(label):
        negatives = len(label) - positives
        figures["ne"] = float(compute_ne(entropy, weight.sum(), positives, negatives, EPSILON))
        figures["auc"] = float(grouped_auc(scored.logit, scored.label, np.zeros(len(label), np.int64))[0][0])
    if positives > 0:
        figures["calibration"] = float(compute_calibration(prediction.sum(), positives))
    auc, size = grouped_auc(scored.logit, scored.label, scored.user)
    if len(auc):
        figures["gauc"], figures["gauc_users"] = float((auc * size).sum() / size.sum()), len(auc)
    request = ndcg(scored.logit, scored.label, scored.impression)
    if len(request):
        figures["ndcg"] = float(request.mean())
    return figures


def by_length(scored: Scored, edges: list[int]) -> dict[str, dict]:
    """edges [20, 50]: 0-19, 20-49 and 50+ events seen."""
    edges, found = sorted(edges), {}
    bucket = np.searchsorted(edges, scored.seen, side="right")
    for number, low in enumerate([0, *edges]):
        name = f"{low}-{edges[number] - 1}" if number < len(edges) else f"{low}+"
        part = scored.where(bucket == number)
        if len(part.label):
            found[name] = figures_of(part)
    return found


def gather(scored: np.ndarray, world: World) -> np.ndarray:
    """(n, F) float64 of every rank, end to end, on every rank. Collective."""
    mine = torch.from_numpy(scored).to(world.device)
    counts = [torch.zeros(1, dtype=torch.int64, device=world.device) for _ in range(world.size)]
    dist.all_gather(counts, torch.tensor([len(mine)], device=world.device))
    longest = max(int(count) for count in counts)
    padded = torch.nn.functional.pad(mine, (0, 0, 0, longest - len(mine)))
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)]).cpu().numpy()
