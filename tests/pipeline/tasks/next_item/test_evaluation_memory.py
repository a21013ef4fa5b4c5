"""Evaluation holds a tile of scores, whatever the users in a batch times the items of the catalogue are."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.world import start_world
from elastic_rec.pipeline.tasks.next_item import sharded_topk as retrieval
from elastic_rec.pipeline.tasks.next_item.evaluation import evaluate
from elastic_rec.pipeline.tasks.next_item.task import NextItemTask

USERS, ITEMS, TILE = 200, 50_000, 1 << 18


@pytest.fixture(scope="module")
def world():
    yield start_world("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("wide")
    number = np.arange(ITEMS)
    events = pa.table({"user_id": number % USERS, "item_id": number, "timestamp": number})
    pq.write_table(events, folder / "e.parquet")
    ingest(IngestConfig(input=[str(folder / "e.parquet")], out=str(folder / "s"), num_buckets=2, threads=1))
    return str(folder / "s")


def peak_bytes(function) -> int:
    """Most bytes of tensors held at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("seen", [Seen.keep, Seen.exclude])
def test_no_matrix_of_users_and_items(world, store, monkeypatch, seen):
    monkeypatch.setattr(retrieval, "TILE", TILE)
    config = TrainConfig()
    config.data.store, config.memory.enabled, config.data.max_history = store, False, 8
    config.model.width, config.model.heads, config.model.layers, config.model.experts = 8, 2, 1, 2
    task = NextItemTask(config, world=world)
    model = task.build_model()
    settings = {"stage": "test", "k": [10], "length_edges": [50], "batch_size": USERS, "min_item_count": 1}
    found = {}
    peak = peak_bytes(lambda: found.update(evaluate(task, model, seen=seen, **settings)))
    assert found["users"] == USERS and found["frequent_items"]["items"] == ITEMS
    print(f"{peak:,} bytes; users x items as float32 {4 * USERS * ITEMS:,}")
    assert peak < 64 * TILE < 0.5 * 4 * USERS * ITEMS, f"{peak:,} bytes"
    monkeypatch.setattr(retrieval, "TILE", USERS * ITEMS)
    monkeypatch.setattr(retrieval, "CHUNK", ITEMS)
    assert peak_bytes(lambda: evaluate(task, model, seen=seen, **settings)) > 4 * USERS * ITEMS, "the check can fail"
