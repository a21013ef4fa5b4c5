"""Which task a run is about: chosen by `task` in its config."""

from __future__ import annotations

from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.config.verbs import Task, TrainConfig
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.next_item.task import NextItemTask
from elastic_rec.pipeline.tasks.ranking.task import RankingTask

AnyTask = NextItemTask | RankingTask
TASKS = {Task.next_item: NextItemTask, Task.ranking: RankingTask}


def make_task(config: TrainConfig, *, world: World, store: str = "", rows: dict[str, int] | None = None) -> AnyTask:
    """store: another than the config's. rows: of the tables of a trained run. Collective."""
    task = TASKS[config.task](config, world=world, store=store, rows=rows)
    _check_same_store(task)
    return task


def _check_same_store(task: AnyTask) -> None:
    """Raises DataError where an append or an overwrite came between two ranks' opening of the store."""
    mine = task.store.manifest.hash + (task.table.manifest.hash if isinstance(task, RankingTask) else "")
    hashes = task.world.of_all(mine)
    if len(set(hashes)) > 1:
        raise DataError(
            f"{task.store.path}: changed while it was opened, rank 0 has version hash {hashes[0][:12]} and another "
            f"rank {next(other for other in hashes if other != hashes[0])[:12]}; run again"
        )
