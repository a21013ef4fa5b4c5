"""A folder of scores: a dataset for its readers, of one model, by one job at a time; broken parts are scored again."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import duckdb
import helpers
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from files_data import config_of, score_run, train_run
from helpers import flip
from ranking_data import RANKING, make_ranking_store

from elastic_rec.feature_store.utils.checked_json import fault_in, read_checked
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.config.demo import DemoConfig
from elastic_rec.pipeline.config.evaluate import EvaluateConfig
from elastic_rec.pipeline.config.score import RankingScoreConfig, ScoreConfig
from elastic_rec.pipeline.config.train import RunConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.world import World, start_world

KINDS = ["full", "incremental"]


@pytest.fixture(scope="module")
def world() -> World:
    yield start_world("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    helpers.make_store(folder, num_users=40, num_buckets=2)
    train_run(world, folder / "store", folder / "run", "optim.max_steps=3")
    return folder / "run"


@pytest.fixture(scope="module")
def ranking(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranking")
    store = make_ranking_store(folder, num_users=30)
    train_run(world, store, folder / "run", "optim.max_steps=2", base=RANKING)
    return folder / "run"


@pytest.fixture
def out(run, world, tmp_path) -> Path:
    score_run(world, run, tmp_path / "out")
    return tmp_path / "out"


def rows(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def is_whole(out: Path) -> bool:
    """Its parts are those of its manifest."""
    parts = {entry["path"]: entry for entry in read_checked(out / "_manifest.json")["parts"]}
    return fault_in(out, parts) == "" and parts.keys() == {path.name for path in out.glob("*.parquet")}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_dataset(run, world, tmp_path, kind):
    out = tmp_path / "out"
    score_run(world, run, out, kind=kind)
    assert sorted(path.name for path in out.iterdir()) == [
        "_job.json", "_manifest.json", "part-00000.parquet", "part-00001.parquet"
    ]  # fmt: skip
    (out / ".part-00000.parquet.tmp").write_bytes(b"of a killed job")
    users = list(range(1, 41))
    assert sorted(pd.read_parquet(out)["user_id"]) == users
    assert sorted(pyarrow.dataset.dataset(out).to_table()["user_id"].to_pylist()) == users
    assert sorted(pq.read_table(out)["user_id"].to_pylist()) == users
    found = duckdb.sql(f"select user_id from read_parquet('{out}/*.parquet') order by user_id").fetchall()
    assert [user for (user,) in found] == users
    assert is_whole(out)
    score_run(world, run, out, kind=kind)
    assert not (out / ".part-00000.parquet.tmp").exists()


def test_it_is_a_dataset_for_spark(out):
    sql = pytest.importorskip("pyspark.sql", reason="no PySpark: pip install 'elastic-rec[spark]'")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("no Java: Spark needs 17 or newer")
    spark = sql.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        found = sorted(spark.read.parquet(str(out)).collect())
        assert [(row.user_id, len(row.item_ids), len(row.scores)) for row in found] == [(u, 5, 5) for u in range(1, 41)]
    finally:
        spark.stop()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ended", [True, False], ids=["ended job", "killed job"])
def test_a_damaged_part_is_scored_again(run, world, tmp_path, kind, ended, capsys):
    """Of an ended job every flipped bit is noticed; of a killed one every bit that changes what is read."""
    out, rng = tmp_path / "out", random.Random(kind)
    score_run(world, run, out, kind=kind)
    want, whole = rows(out), {path: path.read_bytes() for path in out.glob("*.parquet")}
    for _ in range(4):
        for path in sorted(whole):
            flip(path, rng)
        if not ended:
            (out / "_manifest.json").unlink(missing_ok=True)
        capsys.readouterr()
        figures = score_run(world, run, out, kind=kind)
        told = capsys.readouterr().err
        if ended:
            assert figures["skipped_parts"] == 0 and told.count("is damaged") == told.count("scored again") == 2
            assert {path: path.read_bytes() for path in whole} == whole
        assert rows(out) == want and is_whole(out)


@pytest.mark.parametrize("damage", ["empty", "other columns", "fewer rows", "of another job", "no Parquet"])
def test_a_part_that_is_not_this_jobs_is_scored_again(run, world, out, tmp_path, damage, capsys):
    want, part = rows(out), out / "part-00001.parquet"
    table = pq.read_table(part)
    (out / "_manifest.json").unlink()
    if damage == "empty":
        part.write_bytes(b"")
    elif damage == "no Parquet":
        part.write_bytes(b"PAR1" * 30)
    elif damage == "other columns":
        pq.write_table(table.rename_columns(["user_id", "items", "scores"]), part)
    elif damage == "fewer rows":
        pq.write_table(table.slice(1), part)
    else:
        score_run(world, run, tmp_path / "other", k=3)
        shutil.copy(tmp_path / "other" / part.name, part)
    figures = score_run(world, run, out)
    told = capsys.readouterr().err
    assert str(part) in told and "scored again" in told and figures["skipped_parts"] == 1
    assert rows(out) == want


def test_model_a_then_b_then_a_into_one_folder(run, world, tmp_path, capsys):
    mine, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(run, mine)
    score_run(world, mine, out)
    want = rows(out)
    shutil.move(mine, tmp_path / "run-a")
    train_run(world, run.parent / "store", mine, "optim.max_steps=3", "run.seed=1")  # of the same run and step
    with pytest.raises(ConfigError, match=r"scores of another model \(fingerprint \w{12}, this one's is \w{12}\)"):
        score_run(world, mine, out)
    score_run(world, mine, tmp_path / "b")
    assert rows(tmp_path / "b") != want
    shutil.move(mine, tmp_path / "run-b")
    shutil.move(tmp_path / "run-a", mine)
    (out / "_manifest.json").unlink()
    shutil.copy(tmp_path / "b/part-00000.parquet", out)
    figures = score_run(world, mine, out)
    assert rows(out) == want and figures["skipped_parts"] == 1
    assert "part-00000.parquet was made by another job (by another model," in capsys.readouterr().err


def test_what_is_in_the_job_file_decides(run, world, out):
    job = json.loads((out / "_job.json").read_text())
    assert {"model", "store", "step", "k"} <= job.keys()
    shutil.copy(out / "part-00001.parquet", out / "part-00009.parquet")
    with pytest.raises(ConfigError, match=r"part-00009.parquet is no part of this job: remove it"):
        score_run(world, run, out)
    (out / "part-00009.parquet").unlink()
    flip(out / "_job.json", random.Random(0))
    with pytest.raises(ConfigError, match=r"_job.json is damaged.*give another out=DIR"):
        score_run(world, run, out)


def test_other_candidates_are_another_job(ranking, world, tmp_path):
    path, out = tmp_path / "candidates.parquet", tmp_path / "out"
    pq.write_table(pa.table({"user_id": [1, 2, 3], "item_id": [101, 102, 103]}), path, compression="none")
    score_run(world, ranking, out, kind="ranking", candidates=str(path))
    size = path.stat().st_size
    pq.write_table(pa.table({"user_id": [1, 2, 3], "item_id": [101, 102, 104]}), path, compression="none")
    assert path.stat().st_size == size, "nor by name, size or rows to be told from it"
    with pytest.raises(ConfigError, match="made with candidates="):
        score_run(world, ranking, out, kind="ranking", candidates=str(path))


HOLDER = """
import sys
from pathlib import Path
from elastic_rec.feature_store.utils.locks import hold_folder
with hold_folder(Path(sys.argv[1]), job="any", remedy=""):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("job", ["training", "scoring"])
def test_a_second_job_in_a_folder_is_refused_at_once(run, world, tmp_path, job):
    folder = tmp_path / "folder"

    def begin() -> None:
        if job == "training":
            train_run(world, run.parent / "store", folder, "optim.max_steps=1", "run.resume=true")
        else:
            score_run(world, run, folder)

    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdin=-1, stdout=-1) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DataError) as refused:
            begin()
        message = str(refused.value)
        assert f"{folder}: another {job} is at work in it (process {holder.pid} on {socket.gethostname()}" in message
        assert ("another run.dir" if job == "training" else "another out=DIR") in message
        assert os.listdir(folder) == [".lock"], "nothing is written by who is refused"
        holder.kill()
    begin()
    assert not (folder / ".lock").exists()


def test_two_trainings_at_the_same_moment(run, world, tmp_path, monkeypatch):
    """The second has looked at an empty folder, and gets the lock only after the first has ended."""
    from elastic_rec.pipeline.training import run_folder

    def late(*args, **kwargs):
        monkeypatch.undo()
        shutil.copytree(run, tmp_path / "run")
        return run_folder.hold_folder(*args, **kwargs)

    monkeypatch.setattr(run_folder, "hold_folder", late)
    with pytest.raises(ConfigError, match="holds a run already"):
        train_run(world, run.parent / "store", tmp_path / "run")


@pytest.mark.parametrize("url", ["s3://bucket/x", "s3:/bucket/x", "gs://bucket/x", "memory://x", "file:///x"])
def test_runs_and_scores_are_local(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    makers = {
        "run.dir": lambda: RunConfig(dir=url),
        "run": lambda: EvaluateConfig(run=url),
        "out": lambda: ScoreConfig(out=url),
    }
    for key, make in makers.items():
        with pytest.raises(ValueError, match=f"^{key}={url}: runs and scores are on the local disk"):
            make()
    assert RankingScoreConfig(candidates=url).candidates == url, "what is read may be elsewhere"
    for make in (lambda: ScoreConfig(run=url), lambda: DemoConfig(out=url), lambda: config_of(f"run.dir={url}")):
        with pytest.raises(ValueError, match="are on the local disk"):
            make()
    with pytest.raises(ValueError, match=r"^out=s3://\*\*\*@bucket: runs"):
        ScoreConfig(out="s3://KEY:SECRET@bucket")
    assert not list(tmp_path.iterdir())
