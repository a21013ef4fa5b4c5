"""History store -> trained model.

torchrun --nproc-per-node 2 pipeline/train.py data=ml100k run.dir=runs/ml100k
python pipeline/train.py data=ml100k run.dir=runs/ml100k run.resume=true
python pipeline/train.py experiment=ml1m_ranking run.dir=runs/ml1m-ranking
"""

from pathlib import Path

import elastic_rec.models  # noqa: F401 (before TorchRec: it asks whether the stack belongs together)
from elastic_rec.feature_store.reading.cursor import Cursor
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.reading.impression_reader import ImpressionReader
from elastic_rec.models.ranking.model import RankingModel
from elastic_rec.models.retrieval.model import RetrievalModel
from elastic_rec.pipeline.config.verbs import TrainConfig
from elastic_rec.pipeline.runtime.launch import verb
from elastic_rec.pipeline.runtime.sharding import plan_table, shard
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.registry import AnyTask, make_task
from elastic_rec.pipeline.training.checkpoints import Checkpoints
from elastic_rec.pipeline.training.metrics_log import MetricsLog
from elastic_rec.pipeline.training.optimizers import attach_table_optimisers, build_optimiser
from elastic_rec.pipeline.training.run_folder import keep_version, open_run
from elastic_rec.pipeline.training.trainer import Trainer, planned_steps
from elastic_rec.pipeline.training.validation import Validation, prepare


@verb("train", TrainConfig, distributed=True)
def main(config: TrainConfig, world: World) -> dict:
    return train(config, world)


def train(config: TrainConfig, world: World) -> dict:
    config.run.resume |= world.pulse.remembers(config.run.dir)
    keep_version(config)
    task = make_task(config, world=world)
    prepare(task)
    reader = task.train_reader()
    model = task.build_model()
    attach_table_optimisers(model, config.optim)
    with open_run(config, task=task, world=world) as run_dir:
        world.pulse.remember(config.run.dir)  # an attempt after this one, torchrun --max-restarts=N, goes on
        return _train(config, world, run_dir=run_dir, task=task, reader=reader, model=model)


def _train(
    config: TrainConfig,
    world: World,
    *,
    run_dir: Path,
    task: AnyTask,
    reader: HistoryReader | ImpressionReader,
    model: RetrievalModel | RankingModel,
) -> dict:
    model = shard(model, world=world, config=config.parallel, seed=config.run.seed)
    world.say(plan_table(model.plan))
    total_steps = planned_steps(config, reader.num_batches)
    optimiser, scheduler = build_optimiser(model, config.optim, total_steps=total_steps)
    validation = Validation(task, model.module, run_dir=run_dir)
    log = MetricsLog(run_dir, world=world, total_steps=total_steps)
    trainer = Trainer(
        model,
        optimiser,
        scheduler,
        config=config,
        world=world,
        checkpoints=Checkpoints(run_dir, world=world, keep_last=config.run.keep_last),
        log=log,
        num_batches=reader.num_batches,
        batches=lambda epoch, start: task.train_batches(reader, epoch=epoch, start_batch=start),
        validate=validation,
        metric=task.metric,
        cursor=reader.cursor,
        user_ids=lambda rows: task.store.user_ids(rows[rows >= 0].unique().numpy()).to_pylist(),
    )
    if config.run.resume and not trainer.resume():
        world.say(f"run.resume=true, but {run_dir} has no complete checkpoint: starting from the beginning")
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
