"""Small parts of the pipeline: schedule, negatives, loss watch, run log, and the generated reference."""

from __future__ import annotations

import itertools
import json
from importlib import import_module

import numpy as np
import pytest
import torch
from helpers import REPO
from hydra import compose, initialize_config_dir

from elastic_rec.feature_store.table.vocabulary import FIRST
from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.config.train import LossConfig, OptimConfig, RunConfig
from elastic_rec.pipeline.reports.config_reference import reference
from elastic_rec.pipeline.runtime.errors import NonFiniteError
from elastic_rec.pipeline.runtime.launch import CONFIG_DIR
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.next_item.negative_sampling import FullCandidates, SampledCandidates
from elastic_rec.pipeline.training.metrics_log import MetricsLog
from elastic_rec.pipeline.training.optimizers import lr_factor
from elastic_rec.pipeline.training.trainer import LossWatch


def test_config_reference_is_up_to_date():
    assert (REPO / "docs/reference/config.md").read_text() == reference(), "run `make docs`"


@pytest.mark.parametrize("experiment", sorted(p.stem for p in (REPO / "configs/experiment").glob("*.yaml")))
def test_experiments_compose(experiment):
    import_module("elastic_rec.pipeline.train")  # registers the schema that configs/train.yaml names
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        assert compose("train", [f"experiment={experiment}"]).data.store


def test_every_yaml_opens_with_the_command_that_runs_it():
    for path in (REPO / "configs").rglob("*.yaml"):
        head = path.read_text().splitlines()[:2]
        assert any("pipeline/" in line and line.startswith("# ") for line in head), path


def test_schedule_warms_up_and_falls_to_its_end():
    config = OptimConfig(warmup_steps=10, final_lr_ratio=0.1)
    factors = [lr_factor(step, config, total_steps=100) for step in range(101)]
    assert factors[:11] == pytest.approx([*np.arange(1, 11) / 10, 1.0])
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[100] == pytest.approx(0.1)


def test_full_candidates_are_all_items_once():
    ids, log_q = FullCandidates(7).at_step(3)(np.array([4]), np.array([1.0]))
    assert ids.tolist() == [2, 3, 4, 5, 6] and not log_q.any()


def test_negatives_are_shared_seeded_and_drawn_as_log_q_says():
    counts = np.array([0, 0, 100, 10, 1, 1000])
    config = LossConfig(softmax="sampled", num_negatives=40_000, popularity_power=1.0)
    targets = np.array([5, 0]), np.array([1.0, 0.0])
    ids, log_q = SampledCandidates(counts, config, seed=3).at_step(7)(*targets)
    again, _ = SampledCandidates(counts, config, seed=3).at_step(7)(np.array([2]), np.array([1.0]))
    other, _ = SampledCandidates(counts, config, seed=3).at_step(8)(*targets)
    negatives = ids[:40_000]
    assert (negatives == again[:40_000]).all(), "the same on every rank, whatever its targets"
    assert (negatives != other[:40_000]).any()
    assert ids[40_000:].tolist() == [5, FIRST], "then the targets; a row without one points at a real item"
    drawn = np.bincount(negatives, minlength=6)
    expected = np.array([np.exp(log_q[ids == i][0]) if i in negatives else 0 for i in range(6)])
    assert drawn[:2].sum() == 0
    assert (np.abs(drawn - expected) < 4 * np.sqrt(expected + 1)).all()


def test_loss_watch_names_the_first_bad_step_and_its_users():
    watch = LossWatch(user_ids=lambda rows: [f"user{r}" for r in rows.tolist()])
    watch.add(1, torch.tensor(2.0), torch.tensor([1]))
    watch.add(2, torch.tensor(4.0), torch.tensor([2]))
    assert watch.check() == 3.0
    watch.add(3, torch.tensor(1.0), torch.tensor([3]))
    watch.add(4, torch.tensor(float("nan")), torch.tensor([40, 41]))
    watch.add(5, torch.tensor(float("nan")), torch.tensor([5]))
    with pytest.raises(NonFiniteError, match=r"nan at step 4; users of this rank's batch: \['user40', 'user41'\]"):
        watch.check()


def test_resumed_log_drops_lines_that_will_be_written_again(tmp_path):
    log = MetricsLog(tmp_path, world=World(rank=0, size=1, device=torch.device("cpu")), total_steps=10)
    for step in (5, 10, 15):
        log.write("valid", step=step, epoch=0, **{"hr@10": 0.1, "ndcg@10": 0.1, "mrr": 0.1})
    with log.path.open("a") as file:
        file.write('{"kind": "valid", "st')  # cut short by a crash
    log.forget_after(10)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [5, 10]
    log.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(global_batch_size=0), "optim.global_batch_size=0: set at least 1"),
        (lambda: OptimConfig(final_lr_ratio=2), "optim.final_lr_ratio=2: set at least 0, at most 1"),
        (lambda: LossConfig(softmax="half"), "loss.softmax=half: set one of full, sampled"),
        (lambda: RunConfig(keep_last=0), "run.keep_last=0: set at least 1"),
        (lambda: EvaluateConfig(stage="train"), "stage=train: set one of test, valid"),
        (lambda: EvaluateConfig(k=[5]), "must contain 10"),
    ],
)
def test_cross_field_checks_say_what_to_set(make, message):
    with pytest.raises(ValueError, match=message):
        make()
