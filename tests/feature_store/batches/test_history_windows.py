"""Windows of long histories, laid end to end, are the batch that is not cut."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from histories import BY_TIME, LOO, make, random_histories

from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import Targets
from elastic_rec.feature_store.batches.windows import HistoryWindows


def cut(histories: Sequences, *, size: int, stage: str, split=LOO, max_history: int = 60) -> HistoryWindows:
    return HistoryWindows(
        histories, size=size, split=split, stage=stage, max_history=max_history, seed=5, epoch=2, world_size=1
    )


def spans(batch: PrefixBatch, values: torch.Tensor) -> list[list]:
    return [values[start:end].tolist() for start, end in zip(batch.starts.tolist(), batch.ends.tolist(), strict=True)]


def joined(parts: list[list[list]]) -> list[list]:
    """Lists per window and user -> one list per user."""
    return [list(chain.from_iterable(user)) for user in zip(*parts, strict=True)]


@pytest.mark.parametrize("split", [LOO, BY_TIME])
@pytest.mark.parametrize("stage", ["train", "valid", "test", "score"])
@pytest.mark.parametrize("size", [1, 7, 60, 1000])
def test_windows_end_to_end_are_the_whole_batch(stage, size, split):
    h = random_histories()
    whole = make(h, stage=stage, split=split, targets=Targets.every_event, max_history=60)
    windows = cut(h, size=size, stage=stage, split=split)
    batches = [windows.batch(number, windows.count) for number in range(windows.count)]
    longest = int((whole.ends - whole.starts).max())
    assert windows.count == -(-longest // size) and [b.window[0] for b in batches] == list(range(windows.count))
    assert [b.is_last_window for b in batches] == [False] * (windows.count - 1) + [True]
    for name in ("item", "action", "gap"):
        got = joined([spans(b, b.features[name].values()) for b in batches])
        assert got == spans(whole, whole.features[name].values()), name
    assert joined([spans(b, b.times_s) for b in batches]) == spans(whole, whole.times_s)
    for batch in batches:
        assert torch.equal(batch.rows, whole.rows)
        assert len(batch.times_s) == (batch.ends - batch.starts).sum() <= size * len(h.rows), "nothing but the window"
    if stage == "train":
        lengths = whole.ends - whole.starts
        for name in ("targets", "weights"):
            parts = [split_rows(getattr(b, name), b.ends - b.starts) for b in batches]
            assert joined(parts) == split_rows(getattr(whole, name), lengths)
        assert sum(float(b.normaliser) for b in batches) == float(whole.normaliser)
    else:
        last = batches[-1]
        for name in ("targets", "weights", "normaliser"):
            assert torch.equal(getattr(last, name), getattr(whole, name)), name


def split_rows(values: torch.Tensor, lengths: torch.Tensor) -> list[list]:
    return [part.tolist() for part in values.split(lengths.tolist())]


def test_ranks_may_ask_for_more_windows_than_they_have():
    windows = cut(random_histories(lengths=(5, 9)), size=4, stage="train")
    assert windows.count == 2
    batch = windows.batch(2, 3, candidates=lambda targets, weights: (np.arange(2, 9), np.zeros(7, np.float32)))
    assert len(batch.times_s) == len(batch.targets) == 0 and batch.is_last_window
    assert batch.features["item"].lengths().tolist() == [0, 0] and len(batch.features["candidate"].values()) == 7
