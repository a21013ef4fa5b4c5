"""Columns of impressions and items are told apart by name, wherever the planner puts their tables: any number of ranks
trains, resumes, evaluates and scores alike. By position two columns change places between 1 and 2 ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import warm_ranks
from ranking_data import RANKING, make_ranking_store

from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.store import Store

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
    rows = pq.read_table(folder / "impressions.parquet")
    rows = rows.take(np.random.default_rng(0).permutation(len(rows)))
    pq.write_table(rows.drop_columns(["click", "kept"]), folder / "lists.parquet")
    run, figures, scores = f"run={folder}/on-2", [], []
    for ranks in RANKS:
        out = folder / f"scores-{ranks}"
        figures.append(warm_ranks.run("evaluate", run, "checkpoint=last", ranks=ranks))
        arguments = [run, "checkpoint=last", f"candidates={folder}/lists.parquet", f"out={out}", "part_rows=60"]
        warm_ranks.run("score", "ranking", *arguments, ranks=ranks)
        found = [pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))]
        scores.append(pa.concat_tables(found))
    for name in FIGURES:
        assert [each[name] for each in figures] == pytest.approx([figures[0][name]] * len(RANKS), rel=1e-5), name
    for other in scores[1:]:
        np.testing.assert_allclose(flat(other["click"]), flat(scores[0]["click"]), rtol=1e-4, atol=1e-6)
    for label in ("click", "kept"):
        found = [each if label == "click" else each["labels"][label] for each in figures]
        assert_as_delivered(folder, rows, scores[0], label, found)


def flat(column: pa.ChunkedArray) -> np.ndarray:
    return pc.list_flatten(column).to_numpy()


def assert_as_delivered(folder: Path, rows: pa.Table, scores: pa.Table, label: str, figures: list[dict]) -> None:
    """evaluate's figures are those of score.py's files, recomputed from the definitions.

    A probability is rounded to 2^-24 of itself: its logit is off by 2^-24 / (1 - p). Other batches move a logit by
    about 1e-6: 1e-5 is allowed. Cross entropy moves by no more than the logit. The other figures move only where two
    scores are nearer than that, and none are.
    """
    lengths = pc.list_value_length(scores["click"]).to_numpy()
    start = ImpressionTable(Store.open(str(folder / "store"))).percentiles[85]
    tested = np.repeat(rows["timestamp"].to_numpy() >= start, lengths)
    known = tested & ~np.isnan(flat(rows[label]))
    y, p = flat(rows[label])[known], flat(scores[label])[known].astype(float)
    z, off = np.log(p / (1 - p)), 1e-5 + 2.0**-24 / (1 - p)
    user, shown = (np.repeat(part, lengths)[known] for part in (rows["user_id"].to_numpy(), np.arange(len(rows))))
    assert np.diff(np.unique(z)).min() > 2 * off.max(), "no score could change places with another"
    aucs = {u: auc for u in np.unique(user) if (auc := auc_by_pairs(z[user == u], y[user == u])) is not None}
    want = {
        "candidates": known.sum(),
        "auc": auc_by_pairs(z, y),
        "gauc": np.average(list(aucs.values()), weights=[(user == u).sum() for u in aucs]),
        "ndcg": np.mean([ndcg(z[shown == i], y[shown == i]) for i in np.unique(shown[y > 0])]),
    }
    log_loss = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
    for each in figures:
        assert {name: each[name] for name in want} == pytest.approx(want, rel=1e-12)
        assert each["log_loss"] == pytest.approx(log_loss, abs=off.mean())


def auc_by_pairs(z: np.ndarray, y: np.ndarray) -> float | None:
    pairs = [(p > n) + (p == n) / 2 for p in z[y > 0] for n in z[y == 0]]
    return float(np.mean(pairs)) if pairs else None


def ndcg(z: np.ndarray, y: np.ndarray) -> float:
    gain = 1 / np.log2(np.arange(len(z)) + 2)
    share = [y[z == each].mean() for each in np.sort(z)[::-1]]  # equal scores share their places
    return (share * gain).sum() / gain[: int(y.sum())].sum()
