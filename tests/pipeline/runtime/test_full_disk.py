"""Verbs that meet a full disk, a read-only one, too few open files, or a path that cannot be: one line with path and
remedy, exit code 2, nothing half-written, and the same command goes on once the cause is gone."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import helpers
import pyarrow.parquet as pq
import pytest
import ranking_data
from jobs_verbs import Done, Verbs

TEXTS = {"full": "No space left on device", "read-only": "Read-only file system"}


@pytest.fixture(scope="module")
def verbs(tmp_path_factory):
    served = Verbs(tmp_path_factory.mktemp("verbs"))
    yield served
    served.close()


@pytest.fixture(scope="module")
def made(verbs, tmp_path_factory) -> Path:
    """Stores and runs of both tasks."""
    folder = tmp_path_factory.mktemp("made")
    helpers.make_store(folder / "items")
    ranking_data.make_ranking_store(folder / "ranking")
    verbs.good("train", *train(folder), f"run.dir={folder}/run")
    tiny = ["model.width=8", "model.experts=2", "memory.num_keys=8", "model.dropout=0", "data.max_history=64"]
    ranking = ["task=ranking", f"data.store={folder}/ranking/store", "optim.global_batch_size=16", *tiny]
    verbs.good("train", *ranking, f"run.dir={folder}/ranking-run", "optim.epochs=1")
    lists = pq.read_table(folder / "ranking/impressions.parquet", columns=["user_id", "item_id"])
    pq.write_table(lists, folder / "lists.parquet")
    return folder


def train(folder: Path) -> list[str]:
    causal = ["model.tower=elastic_causal", "data.targets=every_event", "model.chunk=4", "optim.epochs=1"]
    return [*helpers.SMALL_TRAIN, *causal, f"data.store={folder}/items/store"]


def command(name: str, made: Path, place: Path) -> list[str]:
    """A verb that writes into `place`."""
    events = f"[{made}/items/events.parquet]"
    run = ["score", f"run={made}/run", f"out={place}/{name}"]
    return {
        "create": ["ingest", "data=files", f"data.ingest.input={events}", f"data.store={place}/store"],
        "train": ["train", *train(made), f"run.dir={place}/run"],
        "evaluate": ["evaluate", f"run={place}/run"],
        "full": run,
        "incremental": ["score", "incremental", *run[1:], f"store={made}/items/store"],
        "ranking": [
            "score",
            "ranking",
            f"run={made}/ranking-run",
            f"candidates={made}/lists.parquet",
            f"out={place}/ranking",
        ],
        "describe": ["describe", f"store={made}/items/store", f"out={place}/page.html"],
    }[name]


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    if subprocess.run(["mount", *options, str(place)], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def check(done: Done, what: str, place: Path) -> None:
    assert done.code == 2, done.err
    assert done.last.startswith("error: ") and what in done.last and str(place) in done.last, done.err
    assert "Traceback" not in done.err and done.err.count("error:") == 1
    assert not [path for path in place.rglob("*.tmp*") if path.suffix != ".tmp" or path.name[:5] != "step-"]


WRITERS = ("create", "train", "evaluate", "full", "incremental", "ranking", "describe")


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk(verbs, made, tmp_path, name):
    """A real file system with a page of space; then with enough."""
    place = tmp_path / "disk"
    place.mkdir()
    with mounted(place, "-t", "tmpfs", "-o", "size=64m", "tmpfs"):
        if name == "evaluate":
            shutil.copytree(made / "run", place / "run")
        filler = place / "filler"
        left = 0 if name == "evaluate" else 1  # what evaluate writes fits into a page
        subprocess.run(["fallocate", "-l", f"{4 * os.statvfs(place).f_bavail - 4 * left}KiB", str(filler)], check=True)
        check(verbs.run(*command(name, made, place)), TEXTS["full"], place)
        filler.unlink()
        again = ["run.resume=true"] if name == "train" else []
        verbs.good(*command(name, made, place), *again)


@pytest.mark.parametrize("name", WRITERS[:-1])
def test_read_only_disk(verbs, made, tmp_path, name):
    place = tmp_path / "disk"
    place.mkdir()
    if name == "evaluate":
        shutil.copytree(made / "run", place / "run")
    with mounted(place, "--bind", "-o", "ro", str(place)):
        check(verbs.run(*command(name, made, place)), TEXTS["read-only"], place)


@pytest.mark.parametrize(("name", "bytes"), [("create", 3_000), ("train", 3_000), ("full", 300), ("describe", 3_000)])
def test_files_that_may_not_grow(verbs, made, tmp_path, name, bytes):
    """Without any rights: a limit on the size of files stops writes half-way, as a full disk does."""
    check(verbs.run(*command(name, made, tmp_path), FSIZE=bytes), "File too large", tmp_path)


@pytest.mark.parametrize("name", WRITERS[:-1])
def test_too_few_open_files(verbs, made, tmp_path, name):
    """At every limit a verb does its work, or says what it lacks."""
    if name == "evaluate":
        shutil.copytree(made / "run", tmp_path / "run")
    for limit in (9, 12):
        done = verbs.run(*command(name, made, tmp_path), NOFILE=limit)
        if done.code:
            assert done.code == 2 and f"this process may have {limit}" in done.last and "ulimit -n" in done.last
            assert "Traceback" not in done.err


@pytest.mark.parametrize("name", ["create", "train", "full", "ranking"])
def test_a_path_below_a_file(verbs, made, tmp_path, name):
    (tmp_path / "file").touch()
    done = verbs.run(*command(name, made, tmp_path / "file"))
    what = "File exists" if "File exists" in done.last else "Not a directory"  # the folder itself, or one below
    check(done, what, tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["evaluate", "run={}/none"], "is not a run folder"),
        (["score", "run={}/none", "out={}/scores"], "is not a run folder"),
        (["describe", "store={}/none"], "unfinished or not a history store"),
        (["describe", "store={}/items/store", "version=7", "out={}/x.html"], "no version 7"),
        (["train", "data.store={}/none", "run.dir={}/x"], "not a history store"),
        (["ingest", "data=files", "data.ingest.input=[{}/none.csv]", "data.store={}/x"], "no file matches"),
        (["score", "run={}/run", "out={}/scores", "store={}/none"], "not a history store"),
    ],
)
def test_what_is_not_there(verbs, made, arguments, text):
    done = verbs.run(*(argument.format(made) for argument in arguments))
    assert done.code == 2 and text in done.last and done.err.count("\n") == 1, done.err
    assert not (made / "x").exists() and not (made / "scores").exists()


def test_yaml_that_is_damaged(verbs, made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("model:", "model: ["))
    done = verbs.run("evaluate", f"run={tmp_path}/run")
    assert done.code == 2 and str(config) in done.last and done.err.count("\n") == 1, done.err


def test_candidates_whose_footer_lies(verbs, made, tmp_path):
    lists = tmp_path / "lists.parquet"
    shutil.copy(made / "lists.parquet", lists)
    helpers.claim_rows(lists, pq.read_metadata(lists).num_rows, 1 << 40)
    done = verbs.run("score", "ranking", f"run={made}/ranking-run", f"candidates={lists}", f"out={tmp_path}/scores")
    assert done.code == 2 and "1,099,511,627,776 rows" in done.last and not (tmp_path / "scores").exists()
