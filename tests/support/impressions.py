"""Random impressions beside random events."""

from __future__ import annotations

import numpy as np

from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig


def random_impressions(users: list, items: list, *, num: int = 400, seed: int = 1) -> list[dict]:
    """Times on the events' own ticks, so that ties abound; some users and items that no event has; null labels."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num):
        n = int(rng.integers(1, 5))
        labels = [None if rng.random() < 0.1 else float(x) for x in rng.integers(0, 2, n)]
        rows.append(
            {
                "user_id": users[rng.integers(0, len(users))],
                "timestamp": int(rng.integers(1_000_000, 1_000_050)),
                "candidates": [items[i] for i in rng.integers(0, len(items), n)],
                "click": labels,
                "watched": [float(x) / 128 for x in rng.integers(0, 129, n)],
                "device": None if rng.random() < 0.1 else ("tv", "phone", "web")[rng.integers(0, 3)],
                "tags": [] if rng.random() < 0.2 else [int(x) for x in rng.integers(5, 9, rng.integers(1, 4))],
            }
        )
    return rows


def config_of(folder, **changes) -> ImpressionConfig:
    return ImpressionConfig(
        **{
            "input": [str(folder / "impressions-*.parquet")],
            "candidates_column": "candidates",
            "label_columns": ["click", "watched"],
            "context_columns": ["device", "tags"],
            "item_input": str(folder / "items.parquet"),
            "item_column": "item",
            "item_context_columns": ["genres", "year"],
            "row_group_candidates": 50,
            **changes,
        }
    )
