"""After a power cut at any moment nothing is lost that was acknowledged, and a rerun ends as if there had been none."""

from __future__ import annotations

import shutil
from pathlib import Path

import helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from files_data import score_run, train_run
from power_cut import PowerCut
from ranking_data import RANKING, make_ranking_store

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig
from elastic_rec.feature_store.states.files import StateWriter
from elastic_rec.pipeline.runtime import interrupts
from elastic_rec.pipeline.runtime.pulse import Pulse
from elastic_rec.pipeline.runtime.world import World, start_world
from elastic_rec.pipeline.tasks.score_folder import ScoreFolder
from elastic_rec.pipeline.training.checkpoints import Checkpoints
from elastic_rec.pipeline.training.run_folder import read_config, read_tables


@pytest.fixture(scope="module")
def world() -> World:
    yield start_world("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def run(world, tmp_path_factory) -> Path:
    """A causal run and its store, of two buckets."""
    folder = tmp_path_factory.mktemp("cut")
    store = helpers.make_store(folder, num_users=40, num_buckets=2)
    train_run(world, store, folder / "run", "optim.max_steps=2")
    return folder / "run"


def rows(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def acknowledge_parts(cut: PowerCut, monkeypatch) -> None:
    commit = ScoreFolder.commit

    def committed(folder, number, *args, **kwargs):
        commit(folder, number, *args, **kwargs)
        cut.acknowledge(folder.path(number).name)

    monkeypatch.setattr(ScoreFolder, "commit", committed)


def check_scores(cut: PowerCut, score, out: Path, *, at_least: int) -> None:
    """At each moment: acknowledged parts are there as they were written; a rerun ends with the same scores."""
    moments, want = cut.moments(), rows(out)
    parts = {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}
    assert len(moments) >= at_least and parts.keys() == cut.acknowledged and want
    for moment in moments:
        cut.restore(moment.image)
        for name in moment.acknowledged:
            assert (out / name).read_bytes() == parts[name]
        figures = score()
        assert figures["skipped_parts"] >= len(moment.acknowledged)
        assert rows(out) == want


def test_scores(world, run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "root" / "scores"
    out.parent.mkdir()
    with PowerCut(out.parent) as cut, monkeypatch.context() as patch:
        acknowledge_parts(cut, patch)
        score_run(world, run, out)
    check_scores(cut, lambda: score_run(world, run, out), out, at_least=10)
    assert "is damaged" not in capsys.readouterr().err, "a part has its name only when it has its content"


def test_scores_of_candidates(world, tmp_path_factory, tmp_path, monkeypatch):
    folder = tmp_path_factory.mktemp("ranking")
    store = make_ranking_store(folder, num_users=30)
    train_run(world, store, folder / "run", "optim.max_steps=2", base=RANKING)
    users, items = np.arange(30), [[i % 24 + 100, 101] for i in range(30)]
    pq.write_table(pa.table({"user_id": users, "item_id": items}), folder / "candidates.parquet")
    settings = {"kind": "ranking", "candidates": str(folder / "candidates.parquet"), "part_rows": 15}
    out = tmp_path / "root" / "scores"
    out.parent.mkdir()
    with PowerCut(out.parent) as cut, monkeypatch.context() as patch:
        acknowledge_parts(cut, patch)
        score_run(world, folder / "run", out, **settings)
    check_scores(cut, lambda: score_run(world, folder / "run", out, **settings), out, at_least=10)


def test_incremental_scores_and_states(world, run, tmp_path, monkeypatch):
    """States that reflect today's events never last without the part that was made from them."""
    root = tmp_path / "root"
    shutil.copytree(run.parent / "store", root / "store")
    out, settings = root / "scores", {"kind": "incremental", "store": str(root / "store")}
    score_run(world, run, out, **settings)
    today = pa.table({"user_id": np.arange(1, 41), "item_id": np.arange(40) % 60 + 100, "timestamp": [2_000_000] * 40})
    today = today.append_column("action", pa.array(["view"] * 40))
    pq.write_table(today, tmp_path / "today.parquet")
    append(AppendConfig(input=[str(tmp_path / "today.parquet")], store=str(root / "store"), threads=1))
    before = (out / "part-00000.parquet").read_bytes()

    def committed(writer: StateWriter) -> None:
        parts = cut.acknowledged & {"part-00000.parquet", "part-00001.parquet"}
        states = {what for what in cut.acknowledged if what.startswith("bucket")}
        assert len(parts) == len(states) + 1, "the part first"
        commit(writer)
        cut.acknowledge(writer.path.name)

    commit = StateWriter.commit
    with PowerCut(root) as cut, monkeypatch.context() as patch:
        acknowledge_parts(cut, patch)
        patch.setattr(StateWriter, "commit", committed)
        figures = score_run(world, run, out, **settings)
    assert figures["folded_events"] == 40 and (out / "part-00000.parquet").read_bytes() != before
    cut.acknowledged = {name for name in cut.acknowledged if name.startswith("part-")}
    states = {path.name: path.read_bytes() for path in root.glob("store/states/*/*.parquet")}
    parts = {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}
    want = rows(out)
    moments = cut.moments()
    assert len(moments) >= 15 and len(states) == 2
    for moment in moments:
        cut.restore(moment.image)
        for number in range(2):
            state, part = f"bucket={number:04d}.parquet", f"part-{number:05d}.parquet"
            is_new = next(root.glob(f"store/states/*/{state}")).read_bytes() == states[state]
            assert is_new or state not in moment.acknowledged
            if is_new or part in moment.acknowledged:
                assert (out / part).read_bytes() == parts[part]
        score_run(world, run, out, **settings)
        assert rows(out) == want
        assert {path.name: path.read_bytes() for path in root.glob("store/states/*/*.parquet")} == states


def test_checkpoints(world, run, tmp_path, monkeypatch):
    """The newest acknowledged checkpoint, or a newer one, is whole, and so is what a load needs beside it."""
    save, root = Checkpoints.save, tmp_path / "root"
    root.mkdir()

    def saved(checkpoints, model, optimizer, about, **kwargs):
        save(checkpoints, model, optimizer, about, **kwargs)
        cut.acknowledge(str(about["step"]))

    with PowerCut(root) as cut, monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", saved)
        options = ["optim.max_steps=3", "run.checkpoint_every=1", "run.keep_last=1", "optim.epochs=1"]
        train_run(world, run.parent / "store", root / "run", *options)
    assert cut.acknowledged == {"1", "2", "3"} and len(cut.moments()) >= 30
    for moment in cut.moments():
        cut.restore(moment.image)
        checkpoints = Checkpoints(root / "run", world=world)
        newest = checkpoints.latest() or 0
        assert newest >= max(map(int, moment.acknowledged), default=0)
        if newest:
            read_config(root / "run"), read_tables(root / "run")
            steps = [line for line in (root / "run/metrics.jsonl").read_text().splitlines() if '"train"' in line]
            assert len(steps) >= newest
    train_run(world, run.parent / "store", root / "run", *options, "run.resume=true")


def test_a_step_that_is_saved_again_is_lost_at_no_moment(world, run, tmp_path, monkeypatch):
    """Before its validation when a signal comes, and after it when the run goes on; it is the only one kept. A signal
    does not end a save, however long it takes."""
    root, options, beat = tmp_path / "root", ["optim.max_steps=3", "run.keep_last=1", "optim.epochs=1"], Pulse.beat
    root.mkdir()
    deferred, save = [], Checkpoints.save

    def signalled(pulse: Pulse, at: str) -> None:
        if at == "batch 0 of valid":
            monkeypatch.setattr(interrupts._State, "name", "SIGTERM")
        beat(pulse, at)

    def saved(*args, **kwargs) -> None:
        deferred.append(interrupts._State.num_deferred > 0)
        save(*args, **kwargs)

    monkeypatch.setattr(Pulse, "beat", signalled)
    monkeypatch.setattr(Checkpoints, "save", saved)
    with pytest.raises(interrupts.Interrupted, match="at step 3, which is saved"):
        train_run(world, run.parent / "store", root / "run", *options)
    monkeypatch.undo()
    with PowerCut(root) as cut:
        train_run(world, run.parent / "store", root / "run", *options, "run.resume=true")
    bests = set()
    for moment in cut.moments():
        cut.restore(moment.image)
        checkpoints = Checkpoints(root / "run", world=world)
        assert checkpoints.latest() == 3
        bests.add(checkpoints.marker(3)["best_step"])
    assert deferred == [True] and bests == {None, 3}


def test_the_simulator_sees_a_file_that_is_renamed_before_it_is_synced(tmp_path):
    """What the product did once: 0 bytes under the final name."""
    with PowerCut(tmp_path) as cut:
        (tmp_path / "aside").write_bytes(b"content")
        (tmp_path / "aside").rename(tmp_path / "final")
        cut.acknowledge("final")
    images = [moment.image for moment in cut.moments()]
    assert {"final": b""} in images and {} in images and {"final": b"content"} not in images
