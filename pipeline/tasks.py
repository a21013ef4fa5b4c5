"""Which task a run is about: chosen by `task` in its config."""

from __future__ import annotations

from elastic_rec.pipeline.ranking_task import RankingTask
from elastic_rec.pipeline.schema import Task, TrainConfig
from elastic_rec.pipeline.task import NextItemTask
from elastic_rec.pipeline.world import World

AnyTask = NextItemTask | RankingTask
TASKS = {Task.next_item: NextItemTask, Task.ranking: RankingTask}


def make_task(config: TrainConfig, *, world: World, store: str = "", rows: dict[str, int] | None = None) -> AnyTask:
    """store: another than the config's. rows: of the tables of a trained run."""
    return TASKS[config.task](config, world=world, store=store, rows=rows)
