"""Small runs, trained in this process, for the tests of files that survive and are checked."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import helpers
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from elastic_rec.pipeline.config.score import FullScoreConfig, IncrementalScoreConfig, RankingScoreConfig, ScoreConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.launch import CONFIG_DIR
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.score import score
from elastic_rec.pipeline.train import train

CAUSAL = [*helpers.SMALL_TRAIN, "model.tower=elastic_causal", "model.chunk=4", "data.targets=every_event"]


def config_of(*overrides: str) -> TrainConfig:
    import_module("elastic_rec.pipeline.train")  # registers the schema that configs/train.yaml names
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return OmegaConf.to_object(compose("train", list(overrides)))


def train_run(world: World, store: Path, run: Path, *overrides: str, base: list[str] = CAUSAL) -> dict:
    return train(config_of(*base, f"data.store={store}", f"run.dir={run}", *overrides), world)


def score_config(kind: str, **settings) -> ScoreConfig:
    """kind: the command of score.py."""
    kinds = {"full": FullScoreConfig, "incremental": IncrementalScoreConfig, "ranking": RankingScoreConfig}
    return kinds[kind](**settings)


def score_run(world: World, run: Path, out: Path, *, kind: str = "full", **settings) -> dict:
    settings = {"batch_size": 32, "checkpoint": "last", **({} if kind == "ranking" else {"k": 5}), **settings}
    return score(score_config(kind, run=str(run), out=str(out), **settings), world)
