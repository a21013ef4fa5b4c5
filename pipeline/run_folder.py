"""A run folder: the resolved config, what it was trained on, checkpoints, metrics.

RUN/config.yaml      every setting of the run
RUN/tables.json      rows of each embedding table, digests of the ids they stand for, hash of the store's manifest
RUN/baselines.json   figures of counting baselines on validation
RUN/checkpoints/, RUN/metrics.jsonl, RUN/tensorboard/, RUN/metrics.json (evaluate)
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn

from elastic_rec.feature_store.atomic_write import write_json, write_text
from elastic_rec.pipeline.checkpoints import Checkpoints
from elastic_rec.pipeline.data_schema import Seen
from elastic_rec.pipeline.errors import CheckpointError, ConfigError, NonFiniteError
from elastic_rec.pipeline.finite import require_finite_state
from elastic_rec.pipeline.optimisers import attach_table_optimisers
from elastic_rec.pipeline.schema import TrainConfig
from elastic_rec.pipeline.sharding import ParallelConfig, shard
from elastic_rec.pipeline.task import check_tables
from elastic_rec.pipeline.tasks import AnyTask, make_task
from elastic_rec.pipeline.world import World

# What a resumed run cannot change: all that shapes the model, the order of batches, or the targets in them.
FIXED = (
    "task", "model.", "memory.", "loss.", "ranking.", "data.columns", "data.max_history", "data.cuts", "data.window",
    "data.seen", "data.split.", "data.impression_split.", "optim.global_batch_size", "run.seed", "run.precision",
)  # fmt: skip


def keep_generation(config: TrainConfig) -> None:
    """Let a resumed run read the store as it was when the run began, whatever has been appended since, and keep what
    data.seen=auto came to."""
    if config.run.resume and (Path(config.run.dir) / "config.yaml").exists():
        was = read_config(config.run.dir).data
        if config.data.generation is None:
            config.data.generation = was.generation
        if config.data.seen is Seen.auto:
            config.data.seen = was.seen


def open_run(config: TrainConfig, *, task: AnyTask, world: World) -> Path:
    """Make the run folder, or check that a resumed run fits it. Returns its path.

    Raises ConfigError when the folder is taken and run.resume is off, or when a setting that shapes the model or
    the order of batches differs from the run's.
    """
    run_dir = Path(config.run.dir)
    known = run_dir / "config.yaml"
    if known.exists():
        if not config.run.resume:
            raise ConfigError(
                f"{run_dir} holds a run already: set run.resume=true to go on, or another run.dir to start a new one"
            )
        _check_same(read_config(run_dir), config, where=known)
        was = json.loads((run_dir / "tables.json").read_text())["store"]
        now = task.store.manifest["hash"]
        if was != now:
            raise ConfigError(
                f"store {task.store.path} is not the one {run_dir} was trained on (manifest {was[:12]}, "
                f"now {now[:12]}): give the old store, or start a new run with another run.dir"
            )
    dist.barrier()  # nobody writes before everybody has looked
    if world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        digests = {name: task.vocabulary(name).digest(rows) for name, rows in task.rows.items()}
        tables = {"rows": task.rows, "ids": digests, "store": task.store.manifest["hash"]}
        write_json(run_dir / "tables.json", tables)
        saved = OmegaConf.structured(config)
        # Evaluate and score may be started from elsewhere, and after more days were appended.
        saved.data.store, saved.data.generation = str(task.store.path.resolve()), task.store.generation
        write_text(known, OmegaConf.to_yaml(saved))
    dist.barrier()
    return run_dir


def read_config(run: str | Path) -> TrainConfig:
    """The config of a run. Raises CheckpointError when the folder is no run."""
    path = Path(run) / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"{run!s} is not a run folder (no config.yaml): give run=DIR, the run.dir of train.py")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(path)))


def load_model(
    run: str,
    *,
    checkpoint: str,
    world: World,
    parallel: ParallelConfig,
    store: str = "",
    config: TrainConfig | None = None,
    check: Callable[[AnyTask], None] = lambda task: None,
) -> tuple[AnyTask, nn.Module, int]:
    """Rebuild a run's model on this world and load a checkpoint: "best", "last" or a step number.

    store: another than the run's, or the run's in its newest generation. config: the run's, with changes to what does
    not shape the model. check: called with the task before anything is built. Returns (task, unwrapped sharded model
    in eval mode, step). Raises NonFiniteError for weights that are no numbers.
    """
    config = config or read_config(run)
    tables = json.loads((Path(run) / "tables.json").read_text())
    task = make_task(config, world=world, store=store, rows=tables["rows"])
    check_tables(task, tables.get("ids", {}))
    check(task)
    checkpoints = Checkpoints(Path(run), world=world)
    step = _choose(checkpoints, checkpoint)
    checkpoints.progress(step)  # refuse a half-written one before anything is built
    model = task.build_model()
    attach_table_optimisers(model, config.optim)  # their kernels hold the tables; nothing is trained
    sharded = shard(model, world=world, config=parallel, seed=config.run.seed)
    checkpoints.load(step, sharded)
    try:
        require_finite_state(sharded.state_dict(), world)
    except NonFiniteError as error:
        raise NonFiniteError(f"{checkpoints.folder(step)}: {error}; give another checkpoint=STEP") from None
    return task, sharded.module.eval(), step


def _choose(checkpoints: Checkpoints, which: str) -> int:
    if which == "best":
        return checkpoints.best()
    if which == "last":
        step = checkpoints.latest()
        if step is None:
            raise CheckpointError(f"{checkpoints.root} has no complete checkpoint")
        return step
    if not which.isdigit():
        raise ConfigError(f"checkpoint={which!r}: set best, last or a step number")
    return int(which)


def _check_same(old: TrainConfig, new: TrainConfig, *, where: Path) -> None:
    was, now = (_flat(OmegaConf.to_container(OmegaConf.structured(config))) for config in (old, new))
    for key in was:
        if key.startswith(FIXED) and was[key] != now[key]:
            raise ConfigError(
                f"{key} is {now[key]!r}, but {where} was trained with {was[key]!r}: "
                f"set {key}={was[key]} to resume, or another run.dir to start a new run"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(_flat(value, path + ".") if isinstance(value, dict) else {path: value})
    return flat
