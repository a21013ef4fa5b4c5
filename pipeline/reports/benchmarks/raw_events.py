"""A raw event log of any size for benchmarks of ingest: Parquet files, drawn in chunks of bounded memory.

Events are independent draws: users log-normal (most have few events, some very many), items by Zipf's law, times
uniform over a year in no order, so that a sort has everything to do. For sequences with a structure to learn see
feature_store/datasets/synthetic.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FILE_EVENTS = 1 << 22
FIRST_S = 1_700_000_000
YEAR_S = 365 * 24 * 3600
USER_SIGMA, ITEM_EXPONENT = 1.5, 1.0


def write_events(folder: Path, num_users: int, num_events: int, num_items: int, seed: int) -> list[Path]:
    """Writes user_id (1..num_users), item_id (1..num_items) and timestamp (whole seconds), all int64; returns the files
    in order. Users and items that chance leaves out do not occur. Neither id tells how frequent it is."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 0])
    users = np.exp(USER_SIGMA * rng.standard_normal(num_users))
    items = rng.permutation(np.arange(1, num_items + 1, dtype=float) ** -ITEM_EXPONENT)
    user_edges, item_edges = np.cumsum(users), np.cumsum(items)
    paths = []
    for number, start in enumerate(range(0, num_events, FILE_EVENTS)):
        size = min(FILE_EVENTS, num_events - start)
        rng = np.random.default_rng([seed, 1, number])
        events = {
            "user_id": draw(user_edges, rng, size),
            "item_id": draw(item_edges, rng, size),
            "timestamp": FIRST_S + rng.integers(0, YEAR_S, size),
        }
        paths.append(folder / f"events-{number:05d}.parquet")
        pq.write_table(pa.table(events), paths[-1], compression="zstd", use_dictionary=False)
    return paths


def draw(edges: np.ndarray, rng: np.random.Generator, size: int) -> np.ndarray:
    """(size,) ids from 1, id i with a weight of edges[i - 1] - edges[i - 2]."""
    return 1 + np.searchsorted(edges[:-1], rng.random(size) * edges[-1], side="right")
