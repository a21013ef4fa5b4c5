"""A run folder from a stranger is data: loading it executes nothing and resolves nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import helpers
import pytest
import torch
import torch.distributed as dist
from files_data import score_run, train_run

from elastic_rec.feature_store.utils.checked_json import describe_file, read_checked, write_checked
from elastic_rec.pipeline.config.parallel import ParallelConfig
from elastic_rec.pipeline.runtime.errors import CheckpointError
from elastic_rec.pipeline.runtime.world import World, start_world
from elastic_rec.pipeline.training.checkpoints import MARKER
from elastic_rec.pipeline.training.run_folder import load_model, read_config


@pytest.fixture(scope="module")
def world() -> World:
    yield start_world("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def original(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    helpers.make_store(folder, num_users=40, num_buckets=2)
    train_run(world, folder / "store", folder / "run", "optim.max_steps=3")
    return folder / "run"


@pytest.fixture
def run(original, tmp_path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


class Malice:
    """Unpickled, it makes the folder `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """And a proof that the bait works."""
    mark = tmp_path / "executed"
    pickle.loads(pickle.dumps(Malice(mark)))
    assert mark.is_dir()
    mark.rmdir()
    return mark


def uses(run: Path, original: Path, world: World) -> dict:
    """What loads a checkpoint: evaluate, score, and a resumed training."""
    return {
        "evaluate": lambda: load_model(str(run), checkpoint="best", world=world, parallel=ParallelConfig(device="cpu")),
        "score": lambda: score_run(world, run, run.parent / "scores"),
        "resume": lambda: train_run(
            world, original.parent / "store", run, "optim.max_steps=4", "optim.epochs=2", "run.resume=true"
        ),
    }


def sign(folder: Path) -> None:
    """Makes the marker fit its files, as a stranger can."""
    marker = read_checked(folder / MARKER)
    marker["files"] = {name: describe_file(folder / name) for name in marker["files"]}
    write_checked(folder / MARKER, marker)


@pytest.mark.parametrize("use", ["evaluate", "score", "resume"])
def test_the_pickle_of_a_checkpoint_is_not_read(run, original, world, mark, use):
    folder = run / "checkpoints/step-00000003"
    (folder / ".metadata").write_bytes(pickle.dumps(Malice(mark)))
    sign(folder)
    uses(run, original, world)[use]()
    assert not mark.exists()


@pytest.mark.parametrize("use", ["evaluate", "score", "resume"])
def test_a_tensor_that_is_no_tensor_is_refused(run, original, world, mark, use):
    folder = run / "checkpoints/step-00000003"
    bait = io.BytesIO()
    torch.save({"weight": Malice(mark)}, bait)
    (folder / "__0_0.distcp").write_bytes(bait.getvalue())
    plan = json.loads((folder / "tensors.json").read_text())
    for tensor in plan.values():
        for chunk in tensor["chunks"]:
            chunk[3:] = 0, len(bait.getvalue())
    (folder / "tensors.json").write_text(json.dumps(plan))
    sign(folder)
    with pytest.raises(CheckpointError, match="does not fit this model or is damaged"):
        uses(run, original, world)[use]()
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda plan: plan[0].update(chunks=[[[0], [1], "../../../secret", 0, 9]]),
            "names '../../../secret', which is not",
        ),
        (
            lambda plan: plan[0].update(chunks=[[[0], [1], "complete.json", 0, 9]]),
            "names 'complete.json', which is not",
        ),
        (lambda plan: plan[0].update(dtype="load"), "is no plan of a checkpoint"),
        (lambda plan: plan[0].pop("size"), "is no plan of a checkpoint"),
        (lambda plan: plan[0].update(size=["many"]), "is no plan of a checkpoint"),
    ],
)
def test_a_plan_names_tensors_in_its_own_files(run, world, change, message):
    folder = run / "checkpoints/step-00000003"
    plan = json.loads((folder / "tensors.json").read_text())
    change(list(plan.values()))
    (folder / "tensors.json").write_text(json.dumps(plan))
    sign(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(run), checkpoint="last", world=world, parallel=ParallelConfig(device="cpu"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run: {dir: '${oc.env:A_SECRET}'}", r"run.dir is '\$\{oc.env:A_SECRET\}': a run's config holds values"),
        ("data: {columns: ['${oc.decode:x}']}", "data.columns.0 is"),
        ("data: {store: '${run.dir}'}", "data.store is"),
        ("run: !!python/object/apply:os.mkdir [MARK]", "is no config of a run"),
        ("run: {dir: x, hook: y}", "is no config of a run"),
        ("run: [", "is no config of a run"),
    ],
)
def test_a_config_is_values(run, original, world, mark, monkeypatch, line, message):
    monkeypatch.setenv("A_SECRET", "hushhush")
    (run / "config.yaml").write_text(line.replace("MARK", str(mark)) + "\n")
    for use in uses(run, original, world).values():
        with pytest.raises(CheckpointError, match=message) as caught:
            use()
        assert "hushhush" not in str(caught.value)
    assert not mark.exists()


def test_an_edit_by_hand_is_possible_and_not_by_accident(run):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("log_every: 1", "log_every: 7"))
    with pytest.raises(CheckpointError, match="to keep an edit, remove the last line"):
        read_config(run)
    path.write_text(path.read_text().rpartition("# sha256")[0])
    assert read_config(run).run.log_every == 7
