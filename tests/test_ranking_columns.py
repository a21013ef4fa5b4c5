"""Columns of impressions and items are told apart by name, wherever the planner puts their tables: any number of ranks
trains, resumes, evaluates and scores alike. By position two columns change places between 1 and 2 ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import warm_ranks
from ranking_data import make_ranking_store
from test_ranking_task import RANKING

RANKS = (1, 2, 3, 4)
FIGURES = ("auc", "gauc", "ne", "calibration", "ndcg", "log_loss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store with three columns of each kind, and a run of two epochs on each number of ranks."""
    folder = tmp_path_factory.mktemp("columns")
    make_ranking_store(folder, num_users=40, wide=True)
    for ranks in RANKS:
        train(folder, f"on-{ranks}", ranks)
    return folder


def train(folder: Path, name: str, ranks: int, *more: str) -> dict:
    about = [f"data.store={folder}/store", f"run.dir={folder}/{name}", "optim.epochs=2", "run.keep_last=9", *more]
    return warm_ranks.run("train", *RANKING, *about, ranks=ranks)


def lines(run: Path) -> dict[tuple, float]:
    """(step, figure) -> value, of training and validation."""
    found = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        names = FIGURES if line["kind"] == "valid" else ("loss",)
        found |= {(line["step"], name): line[name] for name in names}
    return found


def test_the_planner_puts_columns_in_another_order_than_their_own(folder):
    plan = train(folder, "on-2", 2, "run.resume=true")["stderr"]
    rank_of = {line.split()[0]: line.split()[3] for line in plan.splitlines() if "context." in line}
    for name, columns in (("context", ["device", "page", "country"]), ("item_context", ["tags", "brand", "words"])):
        assert sorted(columns, key=lambda column: rank_of[f"{name}.{column}"]) != columns, plan


def test_training_and_validation_are_the_same_on_any_number_of_ranks(folder):
    one = lines(folder / "on-1")
    assert len(one) > 2 * len(FIGURES)
    for ranks in RANKS[1:]:
        assert lines(folder / f"on-{ranks}") == pytest.approx(one, rel=2e-4), ranks


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_of_two_ranks_goes_on_with_others(folder, ranks):
    run = folder / f"moved-{ranks}"
    shutil.copytree(folder / "on-2", run)
    last = max((run / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    train(folder, run.name, ranks, "run.resume=true")
    assert lines(run) == pytest.approx(lines(folder / "on-2"), rel=2e-4)


def test_evaluation_and_scores_are_the_same_on_any_number_of_ranks(folder):
    rows = pq.read_table(folder / "impressions.parquet").drop_columns(["click", "kept"])
    pq.write_table(rows, folder / "lists.parquet")
    run, figures, scores = f"run={folder}/on-2", [], []
    for ranks in RANKS:
        out = folder / f"scores-{ranks}"
        figures.append(warm_ranks.run("evaluate", run, "checkpoint=last", ranks=ranks))
        arguments = [run, "checkpoint=last", f"candidates={folder}/lists.parquet", f"out={out}", "part_rows=60"]
        warm_ranks.run("score", *arguments, ranks=ranks)
        found = [pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))]
        scores.append(np.concatenate([pc.list_flatten(table["click"]).to_numpy() for table in found]))
    for name in FIGURES:
        assert [each[name] for each in figures] == pytest.approx([figures[0][name]] * len(RANKS), rel=1e-5), name
    for other in scores[1:]:
        np.testing.assert_allclose(other, scores[0], rtol=1e-4, atol=1e-6)
