"""Real processes: any number of ranks trains alike, a killed run goes on, half a checkpoint is not read."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import helpers
import numpy as np
import pytest

STEPS = 50


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return helpers.make_store(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def overrides(store: Path) -> list[str]:
    return [
        f"data.store={store}",
        "data.columns=[action]",
        f"optim.max_steps={STEPS}",
        "optim.epochs=20",
        "run.keep_last=5",
    ]


@pytest.fixture(scope="module")
def two_ranks(overrides: list[str], tmp_path_factory) -> tuple[Path, dict]:
    """An uninterrupted run on 2 ranks, and its output."""
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    return run_dir, helpers.run("train", *helpers.SMALL_TRAIN, *overrides, f"run.dir={run_dir}", ranks=2)


def test_one_rank_and_two_ranks_have_the_same_losses_and_metrics(overrides, two_ranks, tmp_path):
    two, output = two_ranks
    one = tmp_path / "one"
    helpers.run("train", *helpers.SMALL_TRAIN, *overrides, f"run.dir={one}")
    losses_1, losses_2 = helpers.train_lines(one), helpers.train_lines(two)
    assert sorted(losses_1) == sorted(losses_2) == list(range(1, STEPS + 1))
    # Which slots of the memory a user reads is a choice: from the first near tie that rounding decides, losses differ.
    for step, loss in losses_1.items():
        assert loss == pytest.approx(losses_2[step], rel=1e-4 if step <= 16 else 1e-2), step

    # The same weights ranked by 1 and by 2 ranks: the same metrics, to the last user.
    figures = [helpers.run("evaluate", f"run={two}", ranks=ranks) for ranks in (1, 2)]
    flat_1, flat_2 = (dict(flatten(f)) for f in figures)
    assert flat_1 == pytest.approx(flat_2, rel=1e-9) and flat_1["users"] == 120
    assert figures[0]["hr@10"] > figures[0]["baselines"]["popularity"]["hr@10"], "it learns"

    plan = output["stderr"]
    for table, rows in (("embeddings.item", 62), ("tower.memory.bank.bank", 256)):
        for rank, (low, high) in enumerate([(0, rows // 2), (rows // 2, rows)]):
            assert any(
                line.split() == [table, "row_wise", "fused", str(rank), f"[{low},", f"{high})"]
                for line in plan.splitlines()
            ), plan


def test_without_choices_one_rank_and_two_ranks_stay_together(overrides, tmp_path):
    arguments = [*helpers.SMALL_TRAIN[:3], "memory=off", *helpers.SMALL_TRAIN[4:], *overrides]
    for ranks in (1, 2):
        helpers.run("train", *arguments, f"run.dir={tmp_path / str(ranks)}", ranks=ranks)
    losses_1, losses_2 = (helpers.train_lines(tmp_path / str(ranks)) for ranks in (1, 2))
    assert len(losses_1) == STEPS and losses_1 == pytest.approx(losses_2, rel=1e-4)


def test_kill_9_inside_an_epoch_then_resume_repeats_the_uninterrupted_run(overrides, two_ranks, tmp_path):
    run_dir = tmp_path / "killed"
    arguments = [*helpers.SMALL_TRAIN, *overrides, f"run.dir={run_dir}", "run.checkpoint_every=5"]
    process = helpers.start("train", *arguments, ranks=2, log=tmp_path / "log")
    wait_for(lambda: (run_dir / "checkpoints/step-00000020/complete.json").exists(), process)
    helpers.kill_9(process)
    assert not (run_dir / f"checkpoints/step-{STEPS:08d}").exists(), "it was killed too late to show anything"

    # A newer checkpoint without its marker: a crash while writing.
    half = run_dir / "checkpoints/step-00000045"
    half.mkdir(exist_ok=True)
    (half / "complete.json").unlink(missing_ok=True)
    again = helpers.run("train", *arguments, "run.resume=true", ranks=2)
    assert "step-00000045 is half-written" in again["stderr"]
    assert "resuming at step" in again["stderr"]
    assert helpers.train_lines(run_dir) == helpers.train_lines(two_ranks[0]), "exactly, optimiser and schedule too"


def test_a_run_of_two_ranks_resumes_on_one(overrides, two_ranks, tmp_path):
    run_dir = tmp_path / "moved"
    shutil.copytree(two_ranks[0], run_dir)
    for folder in (run_dir / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > 24:
            shutil.rmtree(folder)
    output = helpers.run("train", *helpers.SMALL_TRAIN, *overrides, f"run.dir={run_dir}", "run.resume=true")
    assert "resuming at step 24" in output["stderr"]
    got, want = helpers.train_lines(run_dir), helpers.train_lines(two_ranks[0])
    assert got == pytest.approx(want, rel=1e-4) and sorted(got) == list(range(1, STEPS + 1))


def test_a_file_that_another_rank_wrote_is_checked_too(two_ranks, tmp_path):
    run_dir = tmp_path / "damaged"
    shutil.copytree(two_ranks[0], run_dir)
    with (run_dir / f"checkpoints/step-{STEPS:08d}/__1_0.distcp").open("r+b") as file:
        file.seek(1000)
        file.write(bytes([file.read(1)[0] ^ 1]))
    figures = helpers.run("evaluate", f"run={run_dir}", "checkpoint=last", ranks=2)
    assert f"step-{STEPS:08d}/__1_0.distcp is damaged" in figures["stderr"] and figures["step"] < STEPS


def test_errors_name_the_cause_and_the_remedy(store, two_ranks, overrides, tmp_path):
    run_dir, _ = two_ranks
    code, text = helpers.fail("train", *overrides, f"run.dir={run_dir}")
    assert code == 2 and "run.resume=true" in text
    other = [*helpers.SMALL_TRAIN, *overrides, f"run.dir={run_dir}", "run.resume=true", "model.width=32"]
    code, text = helpers.fail("train", *other)
    assert code == 2 and "model.width is 32" in text and "set model.width=16" in text
    code, text = helpers.fail("train", *overrides, f"run.dir={tmp_path}/x", "optim.learning_rate=1")
    assert code == 1 and "learning_rate" in text and "docs/reference/config.md" in text
    code, text = helpers.fail("train", *overrides, f"run.dir={tmp_path}/x", "optim.epochs=many")
    assert code == 1 and "optim.epochs" in text
    code, text = helpers.fail("train", *overrides, f"run.dir={tmp_path}/x", "data.store=/nowhere")
    assert code == 2 and "/nowhere" in text
    code, text = helpers.fail("evaluate", f"run={run_dir}", "checkpoint=45")
    assert code == 2 and "step-00000045 does not exist" in text
    code, text = helpers.fail("evaluate", f"run={tmp_path}")
    assert code == 2 and "not a run folder" in text
    assert not (tmp_path / "x").exists(), "nothing half-written"


def test_causal_training_at_every_position_is_the_same_on_two_ranks(overrides, tmp_path):
    causal = ["data.targets=every_event", "model.tower=elastic_causal", "model.chunk=4", "optim.max_steps=12"]
    for ranks in (1, 2):
        arguments = [*helpers.SMALL_TRAIN, *overrides, *causal, f"run.dir={tmp_path}/{ranks}"]
        helpers.run("train", *arguments, ranks=ranks)
    one, two = (helpers.train_lines(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 12
    assert one[1] == pytest.approx(np.log(60), rel=0.05), "the mean over all positions of a uniform guess"
    assert one[12] < one[1] - 0.1, "it learns"
    code, text = helpers.fail(
        "train", *overrides, "data.targets=every_event", "model.tower=elastic", f"run.dir={tmp_path}/x"
    )
    assert code == 2 and "would train on the answer" in text


def test_training_in_windows_is_the_same_on_two_ranks_and_after_a_kill(overrides, tmp_path):
    windows = [
        "data.targets=every_event", "model.tower=elastic_causal", "model.chunk=4", "memory=off", "data.window=8",
        "optim.max_steps=12",
    ]  # fmt: skip
    arguments = [*helpers.SMALL_TRAIN, *overrides, *windows, "run.checkpoint_every=2"]
    for ranks in (1, 2):
        helpers.run("train", *arguments, f"run.dir={tmp_path}/{ranks}", ranks=ranks)
    one, two = (helpers.train_lines(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one == pytest.approx(two, rel=1e-4) and len(one) == 12
    assert one[1] == pytest.approx(np.log(60), rel=0.05) and one[12] < one[1] - 0.1

    for folder in (tmp_path / "2/checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > 6:
            shutil.rmtree(folder)
    again = helpers.run("train", *arguments, f"run.dir={tmp_path}/2", "run.resume=true", ranks=2)
    assert "resuming at step 6" in again["stderr"], "a batch's windows are one step: none is begun half-way"
    assert helpers.train_lines(tmp_path / "2") == two

    # Evaluated in windows or at once, with the same weights: the same ranks for all but rounding.
    cut = helpers.run("evaluate", f"run={tmp_path}/1")
    assert cut["users"] == 120 and cut["hr@10"] > cut["baselines"]["popularity"]["hr@10"] * 0.8


def test_bfloat16_products_train_alike(overrides, tmp_path):
    causal = ["data.targets=every_event", "model.tower=elastic_causal", "model.chunk=4", "optim.max_steps=12"]
    for precision in ("float32", "bfloat16"):
        arguments = [*helpers.SMALL_TRAIN, *overrides, *causal, f"run.precision={precision}"]
        helpers.run("train", *arguments, f"run.dir={tmp_path}/{precision}")
    full, half = (helpers.train_lines(tmp_path / precision) for precision in ("float32", "bfloat16"))
    assert full != half and full == pytest.approx(half, rel=1e-2)


def test_early_stop_and_which_checkpoints_are_kept(overrides, tmp_path):
    run_dir = tmp_path / "x"
    still = ["optim.table_lr=1e-12", "optim.bank_lr=1e-12", "optim.dense_lr=1e-12"]  # validation cannot get better
    arguments = [*helpers.SMALL_TRAIN, *overrides, f"run.dir={run_dir}", *still, "optim.patience=3", "run.keep_last=2"]
    output = helpers.run("train", *arguments)
    assert output["epochs"] == 4 and "early stop: no better validation for 3 epochs" in output["stderr"]
    kept = sorted(int(path.parent.name.removeprefix("step-")) for path in run_dir.glob("checkpoints/*/complete.json"))
    assert kept == [8, 24, 32] and output["best_step"] == 8, "the best and the last two"


def test_more_ranks_than_rows(tmp_path):
    store = helpers.make_store(tmp_path, num_users=2, num_items=3, num_buckets=1)
    code, text = helpers.fail("train", *helpers.SMALL_TRAIN, f"data.store={store}", f"run.dir={tmp_path}/x", ranks=3)
    assert code != 0 and "start at most 2 ranks" in text
    assert not (tmp_path / "x").exists()


def test_non_finite_loss_stops_with_step_and_users(overrides, tmp_path):
    code, text = helpers.fail(
        "train", *helpers.SMALL_TRAIN, *overrides, f"run.dir={tmp_path}/x", "optim.table_lr=1e38", "optim.dense_lr=1e30"
    )
    assert code == 2 and "loss is" in text and "at step" in text and "users of this rank's batch: [" in text
    assert not list(tmp_path.glob("x/checkpoints/step-*")), "no checkpoint of broken weights"


def flatten(figures: dict, prefix: str = ""):
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and key != "ranks":
            yield prefix + key, value


def wait_for(condition, process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)
