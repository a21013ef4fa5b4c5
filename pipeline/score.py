"""Trained model + history store -> the top-k items of every user, in Parquet.

torchrun --nproc-per-node 2 pipeline/score.py run=runs/ml100k out=runs/ml100k/scores
python pipeline/score.py run=runs/mine out=scores/mine mode=incremental
"""

from elastic_rec.pipeline.errors import ConfigError
from elastic_rec.pipeline.incremental import score_increment
from elastic_rec.pipeline.launch import World, verb
from elastic_rec.pipeline.run_folder import load_model, read_config
from elastic_rec.pipeline.schema import ScoreConfig, ScoreMode
from elastic_rec.pipeline.scoring import score_store, scoring_config

MODES = {ScoreMode.full: score_store, ScoreMode.incremental: score_increment}


@verb("score", ScoreConfig, distributed=True)
def main(config: ScoreConfig, world: World) -> dict:
    return score(config, world)


def score(config: ScoreConfig, world: World) -> dict:
    if not config.out:
        raise ConfigError("out is empty: give out=DIR, the folder for the scores")
    run = scoring_config(read_config(config.run), config)
    task, model, step = load_model(
        config.run,
        checkpoint=config.checkpoint,
        world=world,
        parallel=config.parallel,
        store=config.store or run.data.store,
        config=run,
    )
    return {"run": config.run, "step": step, **MODES[config.mode](task, model, step=step, config=config)}


if __name__ == "__main__":
    main()
