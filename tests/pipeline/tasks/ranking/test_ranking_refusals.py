"""Ranking in one process: numbers that are not finite and empty stages are refused, one class leaves figures out."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from ranking_data import make_ranking_store
from torchrec.optim.keyed import CombinedOptimizer

from elastic_rec.feature_store.batches.splits import ImpressionSplit
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions
from elastic_rec.feature_store.table.location import open_location
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.models.ranking.config import RankingConfig
from elastic_rec.models.ranking.model import RankingModel
from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
from elastic_rec.pipeline.config.data import DataConfig
from elastic_rec.pipeline.config.score import RankingScoreConfig
from elastic_rec.pipeline.config.train import TaskName, TrainConfig
from elastic_rec.pipeline.runtime.errors import ConfigError, NonFiniteError
from elastic_rec.pipeline.runtime.world import World, start_world
from elastic_rec.pipeline.tasks.ranking.scoring import RankingScoring, Requests, RowRange
from elastic_rec.pipeline.tasks.ranking.task import RankingTask
from elastic_rec.pipeline.tasks.scoring import score_parts
from elastic_rec.pipeline.training.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranking")
    make_ranking_store(folder, num_users=20)
    return folder


@pytest.fixture
def world():
    yield start_world("cpu")
    dist.destroy_process_group()


def make_task(folder: Path, world: World, valid_time: str = "70%", test_time: str = "85%") -> RankingTask:
    config = TrainConfig(
        task=TaskName.ranking,
        data=DataConfig(
            store=f"{folder}/store",
            columns=["action"],
            impression_split=ImpressionSplit(valid_time=valid_time, test_time=test_time),
        ),
        model=TowerConfig(width=16, experts=2, tower="elastic_causal"),
        memory=MemoryConfig(num_keys=8),
        ranking=RankingConfig(hidden=[8]),
    )
    return RankingTask(config, world=world)


def evaluate(task: RankingTask, model: RankingModel, stage: str) -> dict:
    return task.measure(model, stage=stage, length_edges=[], batch_size=8)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(folder, world, tmp_path, number):
    task = make_task(folder, world)
    model = task.build_model().eval()
    rows = pq.read_table(folder / "impressions.parquet", columns=["user_id", "item_id", "timestamp", "device"])
    bad = int(task.store.vocabulary("item").encode(pa.array([rows["item_id"][0][0].as_py()]))[0])
    with torch.no_grad():
        model.embeddings.embeddings["item"].weight[bad] = number
    pq.write_table(rows, tmp_path / "lists.parquet")
    for stage in ("valid", "test"):
        with pytest.raises(NonFiniteError, match=r"a logit is nan in a list of user \d+, item \d+: take an earlier"):
            evaluate(task, model, stage)
    Checkpoints(tmp_path, world=world).save(model, CombinedOptimizer([]), {"step": 1}, best_step=1)
    config = RankingScoreConfig(run=str(tmp_path), out=f"{tmp_path}/scores", candidates=f"{tmp_path}/lists.parquet")
    scoring = RankingScoring(task, model, step=1, fingerprint="of no file", config=config)
    with pytest.raises(NonFiniteError, match="a logit is nan in a list of user"):
        score_parts(scoring, out=tmp_path / "scores", world=world)
    assert not list((tmp_path / "scores").glob("part-*"))


def test_candidates_of_types_that_would_be_taken_for_others(folder, world, tmp_path):
    """A UUID read as its bytes, or an id that a float no longer holds, would be unknown or a stranger's."""
    task = make_task(folder, world)
    rows = pq.read_table(folder / "impressions.parquet", columns=["user_id", "item_id", "device"]).slice(0, 2)

    def read(**columns: pa.Array) -> Requests:
        table = pa.table({name: columns.get(name, rows[name]) for name in rows.column_names})
        pq.write_table(table, tmp_path / "c.parquet")
        config = RankingScoreConfig(run=str(tmp_path), candidates=str(tmp_path / "c.parquet"))
        scoring = RankingScoring(task, None, step=1, fingerprint="of no file", config=config)
        return Requests.read(scoring, RowRange(0, open_location(tmp_path / "c.parquet"), 0, 0, 2))

    assert read(device=pa.array([None, "tv"]).dictionary_encode()).context["device"].values[0] == 1
    for device in (pa.array([bytes(16)] * 2, pa.uuid()), pa.array([{"a": 1}] * 2), pa.array([1, 2])):
        with pytest.raises(DataError, match=r"c\.parquet, rows 0 to 2 .*: device is .*, not of the store's type"):
            read(device=device)
    with pytest.raises(DataError, match=r"c\.parquet.*: device: Invalid UTF8"):
        read(device=pa.array([b"\xff", b"tv"]))
    assert read(user_id=pa.array([3.0, 2.0**53 - 1])).users
    for ids, first in ((pa.array([3.0, 2.0**53]), 2**53), (pa.array([3.0, -(2.0**24)], pa.float32()), 2**24)):
        with pytest.raises(DataError, match=rf"user_id is (double|float), no longer exact from {first} on"):
            read(user_id=ids)


def test_a_stage_without_impressions_is_refused_with_counts(folder, world):
    never = make_task(folder, world, "2030-01-01", "2031-01-01")
    message = r"no impressions in stage valid: train \d\d+, valid 0, test 0 of \d+, .*impression_split.valid_time=2030"
    with pytest.raises(DataError, match=message):
        never.train_reader()
    with pytest.raises(DataError, match="no impressions in stage test"):
        evaluate(never, never.build_model(), "test")
    with pytest.raises(DataError, match="no impressions in stage train: train 0,"):
        make_task(folder, world, "1970-01-02", "85%").train_reader()
    with pytest.raises(ConfigError, match=r"impression_split: valid_time=85% \(\d+ s\) must be before test_time=85%"):
        make_task(folder, world, "85%", "85%").train_reader()
    with pytest.raises(ValueError, match=r"valid_time 'soon': give an ISO date such as 2001-01-31, or seconds"):
        make_task(folder, world, "soon", "85%").train_reader()


def test_one_class_in_validation_leaves_out_what_is_not_defined(folder, world, tmp_path):
    """The same impressions, none of them clicked in validation."""
    make_ranking_store(tmp_path, num_users=20)
    rows, split = pq.read_table(folder / "impressions.parquet").to_pylist(), make_task(folder, world).table.percentiles
    for row in rows:
        if row["timestamp"] >= split[70]:
            row["click"] = [0.0] * len(row["click"])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "impressions.parquet")
    config = ImpressionConfig(input=[f"{tmp_path}/impressions.parquet"], label_columns=["click", "kept"])
    ingest_impressions(config, out=f"{tmp_path}/store")
    task = make_task(tmp_path, world)
    figures = evaluate(task, task.build_model(), "valid")
    assert figures.keys() == {"label", "candidates", "log_loss", "by_length", "labels"}
    assert 0 < figures["labels"]["kept"]["auc"] < 1, "the other label has both classes"
