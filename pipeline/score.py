"""Trained model + history store -> the top-k items of every user, in Parquet; or, for a run with task=ranking, a score
for each candidate of given lists.

torchrun --nproc-per-node 2 pipeline/score.py run=runs/ml100k out=runs/ml100k/scores
python pipeline/score.py run=runs/mine out=scores/mine mode=incremental
python pipeline/score.py task=ranking run=runs/ml1m-ranking candidates=lists.parquet out=scores/lists
"""

import elastic_rec.models  # noqa: F401 (before TorchRec: it asks whether the stack belongs together)
from elastic_rec.pipeline.config.verbs import ScoreConfig, ScoreMode, Task, TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import verb
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.next_item.incremental import score_increment
from elastic_rec.pipeline.tasks.next_item.scoring import score_store, scoring_config
from elastic_rec.pipeline.tasks.next_item.targets import resolve_seen
from elastic_rec.pipeline.tasks.next_item.task import ALL
from elastic_rec.pipeline.tasks.ranking.scoring import score_candidates
from elastic_rec.pipeline.training.run_folder import load_model, model_fingerprint, read_config

MODES = {ScoreMode.full: score_store, ScoreMode.incremental: score_increment}


@verb("score", ScoreConfig, distributed=True)
def main(config: ScoreConfig, world: World) -> dict:
    return score(config, world)


def score(config: ScoreConfig, world: World) -> dict:
    if not config.out:
        raise ConfigError("out is empty: give out=DIR, the folder for the scores")
    run = read_config(config.run)
    if config.task not in (None, run.task):
        raise ConfigError(f"task={config.task.value}, but {config.run} was trained with task={run.task.value}")
    if run.task is Task.ranking:
        return _rank(config, run, world)
    run = scoring_config(run, config)
    task, model, step = load_model(
        config.run,
        checkpoint=config.checkpoint,
        world=world,
        parallel=config.parallel,
        store=config.store or run.data.store,
        config=run,
    )
    fingerprint = model_fingerprint(config.run, step=step, config=task.config, world=world)
    config.seen = resolve_seen(task, config.seen or run.data.seen)
    return {
        "run": config.run,
        "step": step,
        **MODES[config.mode](task, model, step=step, fingerprint=fingerprint, config=config),
    }


def _rank(config: ScoreConfig, run: TrainConfig, world: World) -> dict:
    if config.mode is not ScoreMode.full:
        raise ConfigError("mode=incremental recommends items, a ranking run scores candidates: leave mode out")
    if config.seen is not None:
        raise ConfigError(
            f"seen={config.seen.value}, but a ranking run scores the candidates it is given: leave seen out"
        )
    if config.max_history is not None:
        run.data.max_history = config.max_history or ALL
    task, model, step = load_model(
        config.run,
        checkpoint=config.checkpoint,
        world=world,
        parallel=config.parallel,
        store=config.store or run.data.store,
        config=run,
    )
    fingerprint = model_fingerprint(config.run, step=step, config=task.config, world=world)
    return {
        "run": config.run,
        "step": step,
        **score_candidates(task, model, step=step, fingerprint=fingerprint, config=config),
    }


if __name__ == "__main__":
    main()
