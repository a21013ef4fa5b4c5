"""Validation in training: broken weights are never kept, an undefined figure and a short run are no dead end."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch.distributed as dist
from ranking_data import make_ranking_store

from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.models.ranking.config import History
from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.config.train import TaskName, TrainConfig
from elastic_rec.pipeline.evaluate import run_evaluation
from elastic_rec.pipeline.runtime.errors import ConfigError, NonFiniteError
from elastic_rec.pipeline.runtime.world import World, start_world
from elastic_rec.pipeline.tasks.next_item.task import NextItemTask
from elastic_rec.pipeline.train import train
from elastic_rec.pipeline.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def world() -> World:
    yield start_world("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return helpers.make_store(tmp_path_factory.mktemp("data"), num_users=40)


def config_of(store: Path, run: Path, **optim) -> TrainConfig:
    """4 steps an epoch."""
    config = TrainConfig()
    config.data.store, config.run.dir, config.memory.num_keys = str(store), str(run), 8
    config.model.width, config.model.heads, config.model.layers, config.model.experts = 16, 2, 1, 2
    config.optim.global_batch_size, config.optim.epochs, config.optim.warmup_steps = 10, 2, 0
    for name, value in optim.items():
        setattr(config.optim, name, value)
    return config


def markers(run: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in run.glob("checkpoints/*/complete.json"))


def valid_lines(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "valid"]


@pytest.mark.parametrize(
    ("rate", "found"),
    [
        ({"table_lr": 1e39}, r"embeddings\.embeddings\.item\.weight is (nan|-?inf) in row \d+"),
        ({"dense_lr": 1e37}, r"the query is (nan|-?inf) in the row of user \d+"),  # of weights that are just finite
    ],
)
def test_an_update_that_overflows_after_a_finite_loss_is_not_kept(world, store, tmp_path, rate, found):
    """One step an epoch: the loss of that step is finite, what the weights give after it is not."""
    run = tmp_path / "run"
    train(config_of(store, run, global_batch_size=40, epochs=1), world)
    config = config_of(store, run, global_batch_size=40, epochs=3, **rate)
    config.run.resume = True
    advice = r"The last checkpoint, .*step-00000001, has finite weights: lower optim.dense_lr.*run.resume=true"
    with pytest.raises(NonFiniteError, match=f"^found after step 2: .*{found}.*{advice}"):
        train(config, world)
    assert markers(run) == [1] and Checkpoints(run, world=world).best() == 1
    assert len(valid_lines(run)) == 1, "broken weights get no figures"
    figures = train(replace(config, optim=replace(config.optim, dense_lr=1e-3, table_lr=0.05)), world)
    assert figures["steps"] == 3 and 0 <= figures["valid_ndcg@10"] < 1


def test_the_first_step_may_break_too(world, store, tmp_path):
    for every in (0, 1):
        config = config_of(store, tmp_path / f"run{every}", table_lr=1e39)
        config.run.checkpoint_every = every
        with pytest.raises(NonFiniteError, match="There is no checkpoint yet: lower"):
            train(config, world)
        assert not markers(Path(config.run.dir))


def test_a_run_that_ends_inside_an_epoch_is_validated(world, store, tmp_path):
    run = tmp_path / "run"
    config = config_of(store, run, max_steps=6)
    config.run.checkpoint_every = 6
    figures = train(config, world)
    assert [(line["step"], line["epoch"]) for line in valid_lines(run)] == [(4, 1), (6, 1)]
    assert figures["steps"] == 6 and figures["epochs"] == 1 and figures["best_step"] in (4, 6)
    config = config_of(store, run, max_steps=8)
    config.run.resume = True
    assert train(config, world)["steps"] == 8, "it goes on inside the epoch"
    assert [line["step"] for line in valid_lines(run)] == [4, 6, 8]


def test_an_undefined_metric_keeps_checkpoints_and_patience(world, store, tmp_path, monkeypatch, capsys):
    """What a validation of one class gives: figures without the metric that chooses."""
    monkeypatch.setattr(NextItemTask, "metric", "auc")
    run = tmp_path / "run"
    config = config_of(store, run, patience=1, epochs=3)
    config.run.baselines = False
    figures = train(config, world)
    said = capsys.readouterr().err
    assert said.count("auc is undefined") == 3 and "early stop" not in said
    assert figures["steps"] == 12 and figures["valid_auc"] is figures["best_step"] is figures["below_baseline"] is None
    assert figures["baselines"] == {} and not (run / "baselines.json").exists()
    assert markers(run) == [8, 12]
    marker = json.loads((run / "checkpoints/step-00000012/complete.json").read_text())
    assert marker["progress"]["best"] is marker["best_step"] is None
    monkeypatch.undo()
    found = run_evaluation(EvaluateConfig(run=str(run)), world)
    assert found["step"] == 12 and "best is the newest checkpoint, step 12" in capsys.readouterr().err
    config = config_of(store, run, epochs=4)
    config.run.resume = True
    assert train(config, world)["best_step"] == 16, "a defined figure is better than none"


def test_a_model_below_counting_is_named(world, store, tmp_path, capsys, monkeypatch):
    """These users stay with six items of their own: counting finds them, four updates do not. Baselines are measured
    once, and read when the run goes on."""
    run = tmp_path / "run"
    config = config_of(store, run, epochs=1, dense_lr=1e-9, table_lr=1e-9)
    figures = train(config, world)
    said = capsys.readouterr().err
    best = max(figures["baselines"], key=lambda name: figures["baselines"][name]["ndcg@10"])
    assert set(figures["baselines"]) >= {"popularity", "last_item", "recent", "frequency", "markov_frequency"}
    assert figures["below_baseline"] == best and figures["seen"] == "keep"
    assert said.count("warning:") == 1 and f"below that of the counting baseline {best!r}" in said
    assert said.count("best counting baseline on validation") == 1
    assert valid_lines(run)[0]["below_baseline"] == best
    monkeypatch.setattr(
        "elastic_rec.pipeline.tasks.next_item.validation.fit_baselines", lambda *args, **kwargs: pytest.fail("again")
    )
    config = config_of(store, run, epochs=2)
    config.run.resume = True
    again = train(config, world)
    assert again["baselines"] == figures["baselines"]
    finished = train(config, world)
    assert finished["steps"] == again["steps"] and finished["baselines"] == figures["baselines"]
    found = run_evaluation(EvaluateConfig(run=str(run), checkpoint="4"), world)
    best = max(found["baselines"], key=lambda name: found["baselines"][name]["ndcg@10"])
    assert found["below_baseline"] == best and "warning:" in capsys.readouterr().err


def test_ranking_runs_are_evaluated_on_another_store(world, tmp_path):
    """Of labelled impressions; the policy for items already seen means nothing to them."""
    store, run = make_ranking_store(tmp_path / "data"), tmp_path / "run"
    config = config_of(store, run, epochs=1)
    config.task, config.ranking.hidden, config.ranking.history = TaskName.ranking, [8], History.mean
    train(config, world)
    plain = run_evaluation(EvaluateConfig(run=str(run)), world)
    shutil.move(store, tmp_path / "elsewhere")
    settings = {"run": str(run), "store": str(tmp_path / "elsewhere")}
    found = run_evaluation(EvaluateConfig(version=0, **settings), world)
    assert found == plain | {"store": settings["store"]} and found["auc"] > 0
    assert json.loads((run / "metrics_elsewhere_g0.json").read_text())["auc"] == found["auc"]
    with pytest.raises(ConfigError, match="seen=keep: only for runs with task=next_item"):
        run_evaluation(EvaluateConfig(seen="keep", **settings), world)
    with pytest.raises(ConfigError, match="min_item_count=5: only for runs with task=next_item"):
        run_evaluation(EvaluateConfig(min_item_count=5, **settings), world)
    with pytest.raises(DataError, match="version"):
        run_evaluation(EvaluateConfig(version=7, **settings), world)
