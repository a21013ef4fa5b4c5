"""History store -> trained model.

torchrun --nproc-per-node 2 pipeline/train.py data=ml100k run.dir=runs/ml100k
python pipeline/train.py data=ml100k run.dir=runs/ml100k run.resume=true
python pipeline/train.py experiment=ml1m_ranking run.dir=runs/ml1m-ranking
"""

from pathlib import Path
from typing import Any

from torch import nn

import elastic_rec.models  # noqa: F401 (before TorchRec: it asks whether the stack belongs together)
from elastic_rec.feature_store.reading.cursor import Cursor
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.launch import verb
from elastic_rec.pipeline.runtime.sharding import plan_table, shard
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.base import Reader, Task
from elastic_rec.pipeline.tasks.registry import make_task
from elastic_rec.pipeline.training.checkpoints import Checkpoints
from elastic_rec.pipeline.training.metrics_log import MetricsLog
from elastic_rec.pipeline.training.optimizers import attach_table_optimizers, build_optimizer
from elastic_rec.pipeline.training.run_folder import keep_version, open_run
from elastic_rec.pipeline.training.trainer import Trainer, planned_steps


@verb("train", TrainConfig, distributed=True)
def main(config: TrainConfig, world: World) -> dict[str, Any]:
    """The verb."""
    return train(config, world)


def train(config: TrainConfig, world: World) -> dict[str, Any]:
    """Trains a run, or goes on with it. Collective. Returns what the run came to."""
    config.run.resume |= world.pulse.remembers(config.run.dir)
    keep_version(config)
    task = make_task(config, world=world)
    task.prepare()
    reader = task.train_reader()
    model = task.build_model()
    attach_table_optimizers(model, config.optim)
    with open_run(config, task=task, world=world) as run_dir:
        world.pulse.remember(config.run.dir)  # an attempt after this one, torchrun --max-restarts=N, goes on
        return _train(task, reader, model, run_dir)


def _train(task: Task, reader: Reader, model: nn.Module, run_dir: Path) -> dict[str, Any]:
    config, world = task.config, task.world
    model = shard(model, world=world, config=config.parallel, seed=config.run.seed)
    world.log(plan_table(model.plan))
    total_steps = planned_steps(config, reader.num_batches)
    optimizer, scheduler = build_optimizer(model, config.optim, total_steps=total_steps)
    checkpoints = Checkpoints(run_dir, world=world, keep_last=config.run.keep_last)
    validation = task.validation(run_dir)
    log = MetricsLog(run_dir, world=world, total_steps=total_steps)
    trainer = Trainer(
        model, optimizer, scheduler, task=task, reader=reader, validation=validation, checkpoints=checkpoints, log=log
    )
    if config.run.resume and not trainer.resume():
        world.log(f"run.resume=true, but {run_dir} has no complete checkpoint: starting from the beginning")
    elif trainer.progress.cursor:
        Cursor(**trainer.progress.cursor).check(task.store, rank=world.rank, world_size=world.size)
    progress = trainer.run()
    log.close()
    return {
        "run": str(run_dir),
        "steps": progress.step,
        "epochs": progress.epoch,
        "best_step": progress.best_step,
        f"valid_{task.metric}": progress.best,
        **validation.verdict(progress.best),
        "ranks": world.size,
    }


if __name__ == "__main__":
    main()
