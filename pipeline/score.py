"""Trained model + history store -> the top-k items of every user, in Parquet.

torchrun --nproc-per-node 2 pipeline/score.py run=runs/ml100k out=runs/ml100k/scores
"""

from elastic_rec.pipeline.errors import ConfigError
from elastic_rec.pipeline.launch import World, verb
from elastic_rec.pipeline.run_folder import load_model
from elastic_rec.pipeline.schema import ScoreConfig
from elastic_rec.pipeline.scoring import score_store


@verb("score", ScoreConfig, distributed=True)
def main(config: ScoreConfig, world: World) -> dict:
    if not config.out:
        raise ConfigError("out is empty: give out=DIR, the folder for the scores")
    task, model, step = load_model(
        config.run, checkpoint=config.checkpoint, world=world, parallel=config.parallel, store=config.store
    )
    return {"run": config.run, "step": step, **score_store(task, model, step=step, config=config)}


if __name__ == "__main__":
    main()
