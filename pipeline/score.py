"""Trained model + history store -> the top-k items of every user, in Parquet; or a score for each candidate of lists.

torchrun --nproc-per-node 2 pipeline/score.py run=runs/ml100k out=runs/ml100k/scores
python pipeline/score.py incremental run=runs/mine out=scores/mine
python pipeline/score.py ranking run=runs/ml1m-ranking candidates=lists.parquet out=scores/lists

full (or nothing)   every user, from the history
incremental         every user, from the states that are kept beside the store and the events since; causal runs only
ranking             given lists of candidates; runs with task=ranking
"""

from pathlib import Path
from typing import Any

import elastic_rec.models  # noqa: F401 (before TorchRec: it asks whether the stack belongs together)
from elastic_rec.pipeline.config.score import (
    FullScoreConfig,
    IncrementalScoreConfig,
    RankingScoreConfig,
    ScoreConfig,
)
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import commands, verb
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.registry import scoring_of
from elastic_rec.pipeline.tasks.scoring import score_parts
from elastic_rec.pipeline.training.run_folder import load_model, model_fingerprint, read_config


@verb("score", FullScoreConfig, distributed=True)
def full(config: FullScoreConfig, world: World) -> dict[str, Any]:
    """score.py, score.py full"""
    return score(config, world)


@verb("score_incremental", IncrementalScoreConfig, distributed=True)
def incremental(config: IncrementalScoreConfig, world: World) -> dict[str, Any]:
    """score.py incremental"""
    return score(config, world)


@verb("score_ranking", RankingScoreConfig, distributed=True)
def ranking(config: RankingScoreConfig, world: World) -> dict[str, Any]:
    """score.py ranking"""
    return score(config, world)


def score(config: ScoreConfig, world: World) -> dict[str, Any]:
    """Scores into config.out, in the way of the config's class. Collective. Returns figures."""
    if not config.out:
        raise ConfigError("out is empty: give out=DIR, the folder for the scores")
    run = read_config(config.run)
    kind = scoring_of(run, config)
    task, model, step = load_model(
        config.run,
        checkpoint=config.checkpoint,
        world=world,
        parallel=config.parallel,
        store=config.store or run.data.store,
        config=kind.run_config(run, config),
    )
    fingerprint = model_fingerprint(config.run, step=step, config=task.config, world=world)
    scoring = kind(task, model, step=step, fingerprint=fingerprint, config=config)
    return {"run": config.run, "step": step, **score_parts(scoring, out=Path(config.out), world=world)}


main = commands(full, full=full, incremental=incremental, ranking=ranking)

if __name__ == "__main__":
    main()
