"""A next-item task over a store."""

from __future__ import annotations

from pathlib import Path

from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.next_item.task import NextItemTask


def make_task(store: Path | str, world: World) -> NextItemTask:
    config = TrainConfig()
    config.data.store = str(store)
    return NextItemTask(config, world=world)
