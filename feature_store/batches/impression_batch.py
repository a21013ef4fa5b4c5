"""Batches of impressions: numpy arrays as the reader yields them, and the jagged batch a ranking model takes.

Legend: B impression groups (a user with some of their impressions), T = events of their histories end to end,
I impressions, C candidates of all impressions, L labels.

    groups B         u0                          u1
    events T         a b c d e f                 g h i        newest ones before the group's last impression
    impressions I    i0 (sees a b c)             i2 (sees g h i)
                     i1 (sees b c d e f)                      starts, ends: spans of the T axis
    candidates C     x y | z                     v w          offsets [0, 2, 3, 5], labels (C, L)

A history is in the batch once, however many impressions see it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from elastic_rec.feature_store.batches.examples import gap_buckets
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.torchrec_types import KeyedJaggedTensor, TensorBatch, keyed_jagged
from elastic_rec.feature_store.utils.jagged import Bags


@dataclass(frozen=True)
class Impressions:
    """One rank's share of one global batch.

    histories: of the B impression groups; rows -1 for a user without a history, and for padding. A user's history
        holds at most the newest events before the last of their impressions here; never one at or after it.
    group: (I,) int64 in 0..B-1, ascending: [0, 0, 1] in the drawing. starts, ends: (I,) int64, spans of the histories'
        T axis: the newest max_history events strictly before the impression: [0, 1, 6] and [3, 6, 9].
    times, rows: (I,) int64, times in the histories' unit; rows count through the impressions table, -1 for padding (an
        impression without candidates, so that a rank without impressions still takes part).
    owners: (I,) int64, a number of each user, also of one without a history: the row of their first impression in the
        table. owner_candidates: (I,) int64, candidates of that user in the whole stage: so many, and they are complete.
    candidates: Bags of I, item indices.
    labels: (C, L) float32, NaN where there is no label.
    context: name -> Bags of I. item_context: name -> Bags of C.
    """

    histories: Sequences
    group: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    times: np.ndarray
    rows: np.ndarray
    owners: np.ndarray
    owner_candidates: np.ndarray
    candidates: Bags
    labels: np.ndarray
    context: dict[str, Bags]
    item_context: dict[str, Bags]

    @property
    def times_s(self) -> np.ndarray:
        """(I,) int64 times in whole seconds."""
        return self.times // self.histories.units_per_second


@dataclass
class ImpressionBatch(TensorBatch):
    """What a ranking model's forward takes; everything in it is a tensor or a KeyedJaggedTensor, or None.

    features: KeyedJaggedTensor, stride B. Keys: the event columns, "gap" (see PrefixBatch), and "candidate": the
        candidates of each group's impressions, end to end, so that its values are the C axis and one lookup of the
        item table serves history and candidates.
    times_s: (T,) int64. group, starts, ends: (I,) int64. impression_times_s: (I,) int64.
    query_gap_s: (I,) int64, seconds from the newest event an impression sees to the impression; -1 where it sees none.
    impression: (C,) int64 in 0..I-1, the impression of each candidate.
    labels, label_weights: (C, L) float32; the weight is 0 (and the label 0) where there is no label.
    normaliser: (L,) float32, sum of label_weights on this rank; the caller adds up the ranks.
    context: KeyedJaggedTensor of the context columns, stride I; None where there are none.
    item_context: KeyedJaggedTensor of the items' attributes, stride C; None where there are none.
    rows: (B,) int64 user row in the store, -1: no history or padding. impression_rows: (I,) int64, -1 for padding.
    owners, owner_candidates: (I,) int64, as in Impressions.
    """

    features: KeyedJaggedTensor
    times_s: torch.Tensor
    group: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    impression_times_s: torch.Tensor
    query_gap_s: torch.Tensor
    impression: torch.Tensor
    labels: torch.Tensor
    label_weights: torch.Tensor
    normaliser: torch.Tensor
    context: KeyedJaggedTensor | None
    item_context: KeyedJaggedTensor | None
    rows: torch.Tensor
    impression_rows: torch.Tensor
    owners: torch.Tensor
    owner_candidates: torch.Tensor


def make_impression_batch(impressions: Impressions) -> ImpressionBatch:
    """numpy -> tensors, times in seconds; no copy but for the values of the KeyedJaggedTensors."""
    histories = impressions.histories
    lengths_I, lengths_B = impressions.candidates.lengths, histories.lengths
    columns = {**histories.columns, "gap": gap_buckets(histories)}
    candidates_B = np.bincount(impressions.group, weights=lengths_I, minlength=len(lengths_B)).astype(np.int64)
    bags = [(name, lengths_B, values) for name, values in columns.items()]
    is_labelled = ~np.isnan(impressions.labels)
    label_weights = is_labelled.astype(np.float32)
    return ImpressionBatch(
        features=keyed_jagged([*bags, ("candidate", candidates_B, impressions.candidates.values)]),
        times_s=torch.from_numpy(histories.times_s),
        group=torch.from_numpy(impressions.group),
        starts=torch.from_numpy(impressions.starts),
        ends=torch.from_numpy(impressions.ends),
        impression_times_s=torch.from_numpy(impressions.times_s),
        query_gap_s=torch.from_numpy(_query_gaps(impressions)),
        impression=torch.from_numpy(np.repeat(np.arange(len(lengths_I)), lengths_I)),
        labels=torch.from_numpy(np.where(is_labelled, impressions.labels, np.float32(0))),
        label_weights=torch.from_numpy(label_weights),
        normaliser=torch.from_numpy(label_weights.sum(axis=0)),
        context=_keyed_bags(impressions.context),
        item_context=_keyed_bags(impressions.item_context),
        rows=torch.from_numpy(histories.rows),
        impression_rows=torch.from_numpy(impressions.rows),
        owners=torch.from_numpy(impressions.owners),
        owner_candidates=torch.from_numpy(impressions.owner_candidates),
    )


def _query_gaps(impressions: Impressions) -> np.ndarray:
    sees = impressions.ends > impressions.starts
    gaps = np.full(len(sees), -1, np.int64)
    newest = impressions.histories.times_s[impressions.ends[sees] - 1]
    gaps[sees] = impressions.times_s[sees] - newest
    return gaps


def _keyed_bags(bags: dict[str, Bags]) -> KeyedJaggedTensor | None:
    return keyed_jagged([(name, bag.lengths, bag.values) for name, bag in bags.items()]) if bags else None
