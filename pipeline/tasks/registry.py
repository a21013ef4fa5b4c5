"""The task of each name, and the scorings of each task."""

from __future__ import annotations

from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.config.score import ScoreConfig
from elastic_rec.pipeline.config.train import TaskName, TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.base import Task
from elastic_rec.pipeline.tasks.next_item.task import NextItemTask
from elastic_rec.pipeline.tasks.ranking.task import RankingTask
from elastic_rec.pipeline.tasks.scoring import Scoring

TASKS: dict[TaskName, type[Task]] = {TaskName.next_item: NextItemTask, TaskName.ranking: RankingTask}


def make_task(config: TrainConfig, *, world: World, store: str = "", rows: dict[str, int] | None = None) -> Task:
    """The run's task, as Task.__init__ has it. Raises DataError where ranks open different stores. Collective."""
    task = TASKS[config.task](config, world=world, store=store, rows=rows)
    task.require_same_store()
    return task


def scoring_of(run: TrainConfig, config: ScoreConfig) -> type[Scoring]:
    """The kind of scoring that a config asks for. Raises ConfigError where it is not for runs of this task."""
    for kind in TASKS[run.task].scorings:
        if kind.config_type is type(config):
            return kind
    commands = " or ".join(f"score.py {kind.command}" for kind in TASKS[run.task].scorings)
    raise ConfigError(f"{config.run} was trained with task={run.task}: use {commands}")


def refuse_keys_of_others(run: TrainConfig, config: EvaluateConfig) -> None:
    """Raises ConfigError for a key that means nothing to the run's task."""
    for name, task in TASKS.items():
        for key in task.evaluate_keys:
            if name is not run.task and getattr(config, key):
                raise ConfigError(f"{key}={getattr(config, key)}: only for runs with task={name}; leave it out")
