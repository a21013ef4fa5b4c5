"""Checkpoints are checked before they are believed; what is damaged is passed over, aloud, or refused."""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path

import helpers
import pytest
import torch.distributed as dist
import warm_ranks
from files_data import score_run, train_run
from helpers import flip

from elastic_rec.feature_store.utils.checked_json import read_checked, write_checked
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.pipeline.config.parallel import ParallelConfig
from elastic_rec.pipeline.runtime.errors import CheckpointError
from elastic_rec.pipeline.runtime.world import World, start_world
from elastic_rec.pipeline.training.checkpoints import Checkpoints
from elastic_rec.pipeline.training.run_folder import load_model, read_config, read_tables

STEPS = ["optim.max_steps=6", "run.checkpoint_every=2", "run.keep_last=9", "optim.epochs=9"]


@pytest.fixture(scope="module")
def world() -> World:
    yield start_world("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def original(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checked")
    helpers.make_store(folder, num_users=40, num_buckets=2)
    train_run(world, folder / "store", folder / "run", *STEPS)
    return folder / "run"


@pytest.fixture
def run(original, tmp_path) -> Path:
    """A copy to damage: epochs of 3 steps, checkpoints of steps 2, 3, 4 and 6."""
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def load(run: Path, world: World, checkpoint: str) -> int:
    return load_model(str(run), checkpoint=checkpoint, world=world, parallel=ParallelConfig(device="cpu"))[2]


def resume(run: Path, original: Path, world: World) -> dict:
    return train_run(world, original.parent / "store", run, *STEPS, "run.resume=true")


def faults(run: Path, world: World) -> list[str]:
    """Of all complete checkpoints, a line each."""
    checkpoints = Checkpoints(run, world=world)
    return [fault for step in checkpoints.complete_steps() if (fault := checkpoints._fault(step))]


def test_every_flipped_bit_is_noticed(run, world):
    rng = random.Random(0)
    for path in sorted(step_folder(run, 6).iterdir()):
        whole = path.read_bytes()
        for _ in range(16):
            flip(path, rng)
            assert path.name in faults(run, world)[0]
            path.write_bytes(whole)
    assert faults(run, world) == []
    for path, read in ((run / "config.yaml", read_config), (run / "tables.json", read_tables)):
        whole = path.read_bytes()
        for _ in range(60):
            flip(path, rng)
            with pytest.raises(CheckpointError, match=path.name):
                read(run)
            path.write_bytes(whole)


def test_a_file_cut_short_or_gone_is_named(run, world):
    tensors = step_folder(run, 6) / "__0_0.distcp"
    size = tensors.stat().st_size
    tensors.write_bytes(tensors.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=rf"__0_0.distcp is damaged: {size - 1} bytes, was written with {size}.*2, 3, 4"
    ):
        load(run, world, "6")
    tensors.unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is missing"):
        load(run, world, "6")
    with pytest.raises(CheckpointError, match=r"step-00000005 does not exist .*\[2, 3, 4, 6\]"):
        load(run, world, "5")
    assert [load(run, world, step) for step in ("2", "3", "4")] == [2, 3, 4], "any complete one by its step"


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(run, original, world, capsys):
    flip(step_folder(run, 6) / "__0_0.distcp", random.Random(1))
    assert load(run, world, "last") == 4
    assert "step-00000006/__0_0.distcp is damaged" in capsys.readouterr().err
    (step_folder(run, 4) / "complete.json").write_text("{}")
    figures = resume(run, original, world)
    told = capsys.readouterr().err
    assert "step-00000004/complete.json is damaged" in told and "resuming at step 3" in told
    assert figures["steps"] == 6 and faults(run, world) == [], "written again"
    assert helpers.train_lines(run) == pytest.approx(helpers.train_lines(original), rel=1e-4)


def test_checkpoints_of_an_undone_future_go(run, original, world):
    """Resumed before them, with other steps to save at: they must not be taken for the newest of this run."""
    for step in (4, 6):
        flip(step_folder(run, step) / "tensors.json", random.Random(step))
    options = ["optim.max_steps=5", "run.checkpoint_every=5", "run.keep_last=9", "optim.epochs=9"]
    train_run(world, original.parent / "store", run, *options, "run.resume=true")
    assert Checkpoints(run, world=world).complete_steps() == [2, 3, 5]


def test_all_damaged_is_no_fresh_start(run, original, world):
    for step in (2, 3, 4, 6):
        flip(step_folder(run, step) / ".metadata", random.Random(step))
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged, of steps \[2, 3, 4, 6\]"):
        resume(run, original, world)


def test_the_best_is_known_from_any_marker_and_refused_when_damaged(run, world, capsys):
    best = Checkpoints(run, world=world).best()
    assert load(run, world, "best") == best and best in (3, 6)
    flip(step_folder(run, 6) / "complete.json", random.Random(2))
    older = Checkpoints(run, world=world).best()
    assert older == 3 and "is read from the next older marker" in capsys.readouterr().err
    flip(step_folder(run, 3) / "__0_0.distcp", random.Random(3))
    with pytest.raises(CheckpointError, match=r"step-00000003/__0_0.distcp is damaged.*by its step: \[2, 4, 6\]"):
        load(run, world, "best")
    shutil.rmtree(step_folder(run, 3)), shutil.rmtree(step_folder(run, 4)), shutil.rmtree(step_folder(run, 6))
    capsys.readouterr()
    assert load(run, world, "best") == 2 and "no validation has given a figure" in capsys.readouterr().err


def choose_on_ranks(rank: int, size: int, folder: str) -> None:
    world = start_world("cpu")
    checkpoints = Checkpoints(Path(folder) / ("later" if rank else "now"), world=world)
    (Path(folder) / f"chosen-{rank}").write_text(f"{checkpoints.best()} {checkpoints.latest()}")
    dist.destroy_process_group()


def test_ranks_choose_one_checkpoint_though_a_training_writes_the_next(run, tmp_path):
    """Rank 1 looks when there is a newer and better one."""
    for name in ("now", "later"):
        shutil.copytree(run, tmp_path / name)
    newest = step_folder(tmp_path / "later", 7)
    shutil.copytree(step_folder(run, 6), newest)
    marker = {name: value for name, value in read_checked(newest / "complete.json").items() if name != "sha256"}
    write_checked(newest / "complete.json", {**marker, "step": 7, "best_step": 7})
    best = marker["best_step"]
    warm_ranks.call(choose_on_ranks, str(tmp_path), ranks=2)
    assert [(tmp_path / f"chosen-{rank}").read_text() for rank in (0, 1)] == [f"{best} 6"] * 2


def test_a_copy_under_another_name_is_let_alone(run, world):
    copy = step_folder(run, 6).with_suffix(".bak")
    shutil.copytree(step_folder(run, 6), copy)
    assert load(run, world, "last") == 6 and Checkpoints(run, world=world).complete_steps() == [2, 3, 4, 6]
    Checkpoints(run, world=world).sweep()
    assert (copy / "complete.json").exists()


def test_lines_of_an_attempt_without_a_checkpoint_go(original, world, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "full")

    options = ["optim.max_steps=3", "optim.epochs=9"]
    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(OSError, match="full"):
        train_run(world, original.parent / "store", tmp_path / "run", *options)
    monkeypatch.undo()
    train_run(world, original.parent / "store", tmp_path / "run", *options, "run.resume=true")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("train", 3), ("valid", 3)]


def test_leftovers_go_when_a_training_starts(run, original, world, capsys):
    half, aside = step_folder(run, 5), step_folder(run, 99).with_suffix(".tmp")
    shutil.copytree(step_folder(run, 6), half)
    (half / "complete.json").unlink()
    aside.mkdir()
    leftovers = [
        run / ".config.yaml.tmp",
        run / "checkpoints/.best.json.tmp",
        step_folder(run, 4) / ".complete.json.tmp",
    ]
    for path in leftovers:
        path.touch()
    assert load(run, world, "last") == 6 and half.exists(), "reading removes nothing"
    resume(run, original, world)
    assert not any(path.exists() for path in (half, aside, *leftovers))
    assert f"{half} is half-written (no complete.json): removed" in capsys.readouterr().err


def test_scoring_and_evaluating_may_read_while_a_training_holds_the_folder(run, world):
    from elastic_rec.feature_store.utils.locks import hold_folder

    with hold_folder(run, job="training", remedy="wait"):
        assert score_run(world, run, run.parent / "scores")["users"] == 40


def test_checked_json(tmp_path):
    write_checked(tmp_path / "a.json", {"name": "Größe", "none": float("nan"), "list": [1, {"b": 2.5}]})
    assert read_checked(tmp_path / "a.json") == {"name": "Größe", "none": None, "list": [1, {"b": 2.5}]}
    with pytest.raises(FileNotFoundError):
        read_checked(tmp_path / "b.json")
    (tmp_path / "a.json").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match=r"a\.json is damaged"):
        read_checked(tmp_path / "a.json")
