"""A small store with labelled impressions, where what a user likes shows in his history alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions

GROUPS, PER_GROUP = 4, 6


def make_ranking_store(folder: Path, *, num_users: int = 60, seed: int = 0, wide: bool = False) -> Path:
    """Each user likes one of four groups of items: of his 5 to 40 events two in three, and 9 in 10 of what he clicks.
    "kept" is a second label, unknown for every third candidate. Impressions have 1 to 4 candidates.
    wide: three context and three item columns, of sizes that a planner spreads over the ranks."""
    rng = np.random.default_rng(seed)
    liked = rng.integers(0, GROUPS, num_users)
    lengths = rng.integers(5, 41, num_users)
    user = np.repeat(np.arange(num_users), lengths)
    group = np.where(rng.random(len(user)) < 0.67, liked[user], rng.integers(0, GROUPS, len(user)))
    place = np.arange(len(user)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    events = {
        "user_id": user,
        "item_id": group * PER_GROUP + rng.integers(0, PER_GROUP, len(user)) + 100,
        "timestamp": 1_000_000 + place * 1000 + rng.integers(0, 900, len(user)),
        "action": np.where(rng.random(len(user)) < 0.5, "view", "buy"),
    }
    rows = []
    for u in range(num_users):
        for _ in range(int(rng.integers(2, 9))):
            shown = rng.integers(0, GROUPS * PER_GROUP, int(rng.integers(1, 5)))
            chance = np.where(shown // PER_GROUP == liked[u], 0.9, 0.1)
            clicks = (rng.random(len(shown)) < chance).astype(float)
            rows.append(
                {
                    "user_id": u,
                    "timestamp": int(1_000_000 + rng.integers(0, lengths[u] * 1000 + 5000)),
                    "item_id": (shown + 100).tolist(),
                    "click": clicks.tolist(),
                    "kept": [None if i % 3 == 0 else c for i, c in enumerate(clicks.tolist())],
                    "device": ("tv", "phone")[int(rng.integers(0, 2))],
                }
            )
    items = [{"item_id": i + 100, "tags": ["a", "b", "c"][: i % 4]} for i in range(GROUPS * PER_GROUP)]
    context, item_context = ["device"], ["tags"]
    if wide:
        for row in rows:
            row |= {"page": ("top", "end", "mid")[int(rng.integers(0, 3))], "country": int(rng.integers(0, 40))}
        for i, item in enumerate(items):
            item |= {"brand": i % 12, "words": [str(word) for word in rng.integers(0, 50, i % 5)]}
        context, item_context = [*context, "page", "country"], [*item_context, "brand", "words"]
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(events), folder / "events.parquet")
    pq.write_table(pa.Table.from_pylist(rows), folder / "impressions.parquet")
    pq.write_table(pa.Table.from_pylist(items), folder / "items.parquet")
    store = folder / "store"
    ingest(
        IngestConfig(
            input=[str(folder / "events.parquet")],
            context_columns=["action"],
            num_buckets=3,
            row_group_events=300,
            out=str(store),
        )
    )
    config = ImpressionConfig(
        input=[str(folder / "impressions.parquet")],
        label_columns=["click", "kept"],
        context_columns=context,
        item_input=str(folder / "items.parquet"),
        item_context_columns=item_context,
    )
    ingest_impressions(config, out=str(store))
    return store


RANKING = [
    "task=ranking", "data=files", "data.columns=[action]", "data.impression_split.valid_time=70%",
    "data.impression_split.test_time=85%", "model.width=16", "model.experts=4", "model.dropout=0", "model.chunk=8",
    "model.moments=4", "memory.num_keys=16", "ranking.hidden=[16]", "ranking.dropout=0",
    "ranking.max_impressions_per_user=4",
    "ranking.sharing=mmoe", "ranking.label_weights=[1,0.5]", "ranking.pairwise=0.1", "optim.global_batch_size=16",
    "optim.warmup_steps=5", "optim.table_lr=0.2", "optim.dense_lr=0.005", "optim.epochs=10", "run.log_every=1",
]  # fmt: skip
