"""Random histories, and prefix batches made of them."""

from __future__ import annotations

import numpy as np

from elastic_rec.feature_store.batches.examples import make_prefix_batch
from elastic_rec.feature_store.batches.prefix_batch import PrefixBatch
from elastic_rec.feature_store.batches.sequences import Sequences
from elastic_rec.feature_store.batches.splits import SplitConfig, Targets

LOO = SplitConfig()


BY_TIME = SplitConfig(kind="global_time", valid_time="1500", test_time="2200")


def random_histories(*, seed: int = 0, lengths=(0, 1, 2, 3, 4, 7, 64, 129, 5, 30), first_row: int = 100) -> Sequences:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    times = np.concatenate([np.sort(rng.integers(0, 3000, n)) for n in lengths]).astype(np.int64)
    columns = {"item": rng.integers(2, 50, offsets[-1]), "action": rng.integers(1, 5, offsets[-1])}
    return Sequences(np.arange(len(lengths)) + first_row, offsets, times, columns, num_global_rows=len(lengths))


def make(histories: Sequences, **settings) -> PrefixBatch:
    base = {"split": LOO, "stage": "train", "max_history": 20, "seed": 5, "epoch": 2, "world_size": 1}
    base |= {"targets": Targets.sampled, "prefixes_per_user": 3}
    return make_prefix_batch(histories, **(base | settings))
