"""What the reader yields: numpy arrays, of which batch.py makes tensors. No torch here: ingest does without."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Histories:
    """One rank's share of one global batch, whole histories, straight from Arrow buffers.

    rows: (B,) int64, the user's row number in the store, -1 for a padding user without events.
    offsets: (B+1,) int64.
    columns: name -> (T,) int64 vocabulary indices ("item" always among them).
    times_s: (T,) int64, seconds.
    num_global_users: users in the global batch, over all ranks, padding not counted.
    """

    rows: np.ndarray
    offsets: np.ndarray
    columns: dict[str, np.ndarray]
    times_s: np.ndarray
    num_global_users: int
