"""The jagged batch a model takes, made of the histories that the reader yields (sequences.py).

Legend: B users in this rank's share of a global batch, T = their events laid end to end,
R prefixes (rows of the model's output; several per user in training, one in evaluation).

    users        u0            u1       u2
    events T     a b c d e     f g h    i j
    offsets      0             5        8     10
    prefix r     [start_r, end_r) within one user's events; the target is an event at or after end_r

Events are embedded once per user and gathered once per prefix, so several prefixes of one history
share the lookup and its all-to-all, the most expensive part of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.torchrec_types import KeyedJaggedTensor, TensorBatch, keyed_jagged


def features_of(histories: Sequences) -> KeyedJaggedTensor:
    """The event columns, one key each, stride B; without a copy where there is one column."""
    lengths = histories.lengths
    return keyed_jagged([(name, lengths, values) for name, values in histories.columns.items()])


@dataclass
class PrefixBatch(TensorBatch):
    """What a model's forward takes; all fields but `window` are tensors.

    features: KeyedJaggedTensor, stride B; keys: the event columns, "gap" (log2 bucket of the seconds since the
        user's previous event), and "candidate" (ids the loss ranks against; all of them in row 0, empty in evaluation).
    times_s: (T,) int64 seconds, same offsets as the event columns.
    starts, ends: (R,) int64, prefix r is events [starts[r], ends[r]) of the T axis.
    targets: (R,) int64 item ids, 0 where there is none; (P,), one per event of each prefix, prefixes laid end to end,
        in training with a target after every event.
    weights: float32, like targets: 0 for padding rows and where there is no target.
    log_q: (C,) float32, log of the expected count of each candidate under the sampler (zeros: full softmax).
    normaliser: () float32, what the weighted sum of losses is divided by; the mean over ranks of
        (local sum / normaliser) is the loss of the global batch, whatever the number of ranks.
    rows: (R,) int64, the user's row number in the store, -1 for padding.
    query_gap_s: int64, like targets: seconds from the newest event before a target to the target; -1 where there is
        none, as when a batch is scored for no particular time.
    window: (number, how many): which part of the users' histories this is, where they are cut in several.
    """

    features: KeyedJaggedTensor
    times_s: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    log_q: torch.Tensor
    normaliser: torch.Tensor
    rows: torch.Tensor
    query_gap_s: torch.Tensor
    window: tuple[int, int] = (0, 1)

    @property
    def is_last_window(self) -> bool:
        """Whether no part of the users' histories comes after this one."""
        return self.window[0] + 1 == self.window[1]
