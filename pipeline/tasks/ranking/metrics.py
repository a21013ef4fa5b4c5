"""AUC, GAUC, normalised entropy, calibration and NDCG per request, of a stage's candidates as they come.

    auc           share of (positive, negative) pairs in the right order, a tie counts half (score_counts.py)
    gauc          the same within each user who has both, weighted by their candidates
    log_loss, ne  cross entropy, and divided by that of always saying the mean label (torchrec.metrics.ne)
    calibration   sum of predictions / sum of labels
    ndcg          of each impression with a positive, gains 0 and 1, mean over impressions; tied candidates share the
                  mean of their places, so that equal scores have the NDCG of chance

A label above 0.5 is a positive. Memory does not grow with the stage: sums, counts of scores, and the candidates of
users who are not complete yet. Several ranks may read groups of a user, so their candidates are sent to one of them.
Figures are the same on any number of ranks.

Legend: C candidates, L labels, E classes of length.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

from elastic_rec.feature_store.batches.impression_batch import ImpressionBatch
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.base import length_names
from elastic_rec.pipeline.tasks.ranking.open_users import OpenUsers
from elastic_rec.pipeline.tasks.ranking.score_counts import ScoreCounts

EPSILON = 1e-12
SUMS = ("candidates", "entropy", "prediction", "label", "ndcg", "requests", "gauc", "gauc_weight", "gauc_users")


def grouped_auc(logit: np.ndarray, label: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each group that has a positive and a negative: its AUC, how many candidates it has, and its number."""
    order = np.lexsort((logit, group))
    logit, label, group = logit[order], label[order] > 0.5, group[order]
    first = _run_starts(group)
    sizes = np.diff(np.append(first, len(group)))
    tie = _run_starts(group, logit)
    tied = np.diff(np.append(tie, len(group)))
    rank = np.repeat(tie + (tied - 1) / 2, tied) - np.repeat(first, sizes)  # 0-based, the mean of equal ones
    positives = np.add.reduceat(label.astype(np.int64), first)
    negatives = sizes - positives
    wins = np.add.reduceat(np.where(label, rank, 0.0), first) - positives * (positives - 1) / 2
    both = (positives > 0) & (negatives > 0)
    return wins[both] / (positives * negatives)[both], sizes[both], group[first][both]


def ndcg(logit: np.ndarray, label: np.ndarray, request: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each request with a positive: its NDCG, expected over the orders of equal logits, and its number."""
    order = np.lexsort((-logit, request))
    logit, positive, request = logit[order], label[order] > 0.5, request[order]
    first, tie = _run_starts(request), _run_starts(request, logit)
    tied = np.diff(np.append(tie, len(request)))
    sizes = np.diff(np.append(first, len(request)))
    gain_to = np.append(0.0, np.cumsum(1 / np.log2(np.arange(sizes.max()) + 2)))  # of the first n places
    place = tie - np.repeat(first, sizes)[tie]
    share = np.add.reduceat(positive.astype(np.float64), tie) / tied
    found = np.add.reduceat(share * (gain_to[place + tied] - gain_to[place]), np.searchsorted(tie, first))
    positives = np.add.reduceat(positive.astype(np.int64), first)
    some = positives > 0
    return found[some] / gain_to[positives[some]], request[first][some]


def _run_starts(*keys: np.ndarray) -> np.ndarray:
    """Where a new run of equal keys begins; keys are sorted, and not empty."""
    return np.flatnonzero(np.append(True, np.any([key[1:] != key[:-1] for key in keys], axis=0)))


class RankingMetrics:
    """update() with every batch of a stage, then compute(). Both are collective.

    length_edges [20, 50]: classes of 0-19, 20-49 and 50+ events seen.
    """

    def __init__(self, *, labels: list[str], length_edges: list[int], world: World) -> None:
        self.labels, self.edges, self.world = labels, np.array(sorted(length_edges), np.int64), world
        self.num_classes = len(self.edges) + 1
        self.sums_LE = {name: np.zeros((len(labels), self.num_classes + 1)) for name in SUMS}  # the last: all lengths
        self.counts_LE = [[ScoreCounts() for _ in range(self.num_classes)] for _ in labels]
        self.users = OpenUsers(world)

    def update(self, batch: ImpressionBatch, logits_CL: np.ndarray) -> None:
        """logits_CL: finite float32. batch: on the host."""
        impression_C = batch.impression.numpy()
        seen_C = (batch.ends - batch.starts).numpy()[impression_C]
        length_C = np.searchsorted(self.edges, seen_C, side="right")
        labels_CL, is_labelled_CL = batch.labels.numpy(), batch.label_weights.numpy() > 0
        for number in range(len(self.labels)):
            keep_C = is_labelled_CL[:, number]
            if keep_C.any():
                columns = logits_CL[:, number], labels_CL[:, number], length_C, impression_C
                self._add(number, *(column_C[keep_C] for column_C in columns))
        owner_C, num_C = (part.numpy()[impression_C] for part in (batch.owners, batch.owner_candidates))
        about_C = [length_C, *logits_CL.T, *labels_CL.T, *is_labelled_CL.T]
        self.users.add(owner_C, num_C, np.stack(about_C, axis=1).astype(np.float32))
        self._add_users(*self.users.take_complete())

    def compute(self) -> dict:
        """Figures of the first label, "by_length" of them, and those of each other label under "labels". What is not
        defined is left out: AUC, GAUC and entropy of one class, calibration and NDCG without a positive."""
        self._add_users(*self.users.take_complete(is_last=True))
        table = torch.from_numpy(np.stack([self.sums_LE[name] for name in SUMS])).to(self.world.device)
        dist.all_reduce(table)
        names, found = length_names(self.edges.tolist()), {}
        for number, label in enumerate(self.labels):
            sums_E = [dict(zip(SUMS, column, strict=True)) for column in table[:, number].T.tolist()]
            counts_E, total = [counts.over_ranks(self.world) for counts in self.counts_LE[number]], ScoreCounts()
            for counts in counts_E:
                total.merge(counts.code_N, counts.count_N, counts.bits)
            *parts, whole = map(_figures, sums_E, [*counts_E, total])
            by_length = {name: part for name, part in zip(names, parts, strict=True) if part["candidates"]}
            found[label] = {**whole, "by_length": by_length}
        first, *others = self.labels
        return {"label": first, **found[first], "labels": {name: found[name] for name in others}}

    def _add(self, number: int, logit: np.ndarray, label: np.ndarray, length: np.ndarray, request: np.ndarray) -> None:
        """What one batch says of a label. request: ascending."""
        prediction, target = torch.sigmoid(torch.from_numpy(logit).double()), torch.from_numpy(label).double()
        entropy = compute_cross_entropy(target, prediction, torch.ones_like(target), EPSILON)
        value, which = ndcg(logit, label, request)
        at = length[np.searchsorted(request, which)]
        for name, classes, values in (
            ("candidates", length, np.ones(len(label))),
            ("entropy", length, entropy.numpy()),
            ("prediction", length, prediction.numpy()),
            ("label", length, target.numpy()),
            ("ndcg", at, value),
            ("requests", at, np.ones(len(value))),
        ):
            self.sums_LE[name][number] += np.append(np.bincount(classes, values, self.num_classes), values.sum())
        for each in np.unique(length):
            mine = length == each
            self.counts_LE[number][each].add(logit[mine], label[mine] > 0.5)

    def _add_users(self, user_C: np.ndarray, about_CF: np.ndarray) -> None:
        """AUC within users, and within the candidates of a user in a class of length. about_CF: as `update` made it."""
        length_C, num = about_CF[:, 0].astype(np.int64), self.num_classes
        logits_CL, labels_CL, is_labelled_CL = np.split(about_CF[:, 1:], 3, axis=1)
        for number in range(len(self.labels)):
            keep_C = is_labelled_CL[:, number] > 0
            if not keep_C.any():
                continue
            user, length = user_C[keep_C], length_C[keep_C]
            logit, label = logits_CL[keep_C, number], labels_CL[keep_C, number]
            auc, size, _ = grouped_auc(logit, label, user)
            auc_in, size_in, group = grouped_auc(logit, label, user * num + length)
            for name, within, whole in (
                ("gauc", auc_in * size_in, auc * size),
                ("gauc_weight", size_in, size),
                ("gauc_users", np.ones(len(group)), np.ones(len(auc))),
            ):
                self.sums_LE[name][number] += np.append(np.bincount(group % num, within, num), whole.sum())


def _figures(sums: dict[str, float], counts: ScoreCounts) -> dict[str, float | int]:
    num, positives = sums["candidates"], sums["label"]
    figures: dict[str, float | int] = {"candidates": int(num)}
    if not num:
        return figures
    figures["log_loss"] = sums["entropy"] * math.log(2) / num  # torchrec counts in bits
    if 0 < positives < num:
        about = (torch.tensor(part, dtype=torch.float64) for part in (sums["entropy"], num, positives, num - positives))
        figures["ne"] = float(compute_ne(*about, EPSILON))
    if positives > 0:
        figures["calibration"] = sums["prediction"] / positives
    found = counts.auc()
    if found:
        figures["auc"], off = found
        if off:
            figures["auc_error_at_most"] = off
    if sums["gauc_users"]:
        figures["gauc"] = sums["gauc"] / sums["gauc_weight"]
        figures["gauc_users"] = int(sums["gauc_users"])
    if sums["requests"]:
        figures["ndcg"] = sums["ndcg"] / sums["requests"]
    return figures
