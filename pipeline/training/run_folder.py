"""A run folder: the resolved config, what it was trained on, checkpoints, metrics.

RUN/config.yaml      every setting of the run; its last line is the sha256 of the others
RUN/tables.json      rows of each embedding table, digests of the ids they stand for, hash of the store's manifest
RUN/baselines.json   figures of counting baselines on validation
RUN/checkpoints/, RUN/metrics.jsonl, RUN/tensorboard/, RUN/metrics.json (evaluate)
RUN/.lock            who trains in it, while they do

What is read from a run folder is data: nothing in it is executed, and nothing in config.yaml is resolved.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from elastic_rec.feature_store.utils.checked_json import read_checked, read_signed, write_checked, write_signed
from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.locks import hold_folder
from elastic_rec.pipeline.config.data import Seen
from elastic_rec.pipeline.config.parallel import ParallelConfig
from elastic_rec.pipeline.config.train import TrainConfig
from elastic_rec.pipeline.runtime.errors import CheckpointError, ConfigError, NonFiniteError
from elastic_rec.pipeline.runtime.finite import require_finite_state
from elastic_rec.pipeline.runtime.launch import strings_of
from elastic_rec.pipeline.runtime.sharding import shard
from elastic_rec.pipeline.runtime.world import World
from elastic_rec.pipeline.tasks.base import Task
from elastic_rec.pipeline.tasks.registry import make_task
from elastic_rec.pipeline.training.checkpoints import Checkpoints
from elastic_rec.pipeline.training.optimizers import attach_table_optimizers

# What a resumed run cannot change: all that shapes the model, the order of batches, or the targets in them.
FIXED = (
    "task", "model.", "memory.", "loss.", "ranking.", "data.columns", "data.max_history", "data.targets",
    "data.prefixes_per_user", "data.window", "data.seen", "data.split.", "data.impression_split.",
    "optim.global_batch_size", "run.seed", "run.precision",
)  # fmt: skip


SHAPE = ("task", "model.", "memory.", "ranking.", "data.columns")
CONFIG, TABLES = "config.yaml", "tables.json"


def keep_version(config: TrainConfig) -> None:
    """Let a resumed run read the store as it was when the run began, whatever has been appended since, and keep what
    data.seen=auto came to."""
    if config.run.resume and (Path(config.run.dir) / CONFIG).exists():
        was = read_config(config.run.dir).data
        if config.data.version is None:
            config.data.version = was.version
        if config.data.seen is Seen.auto:
            config.data.seen = was.seen


@contextmanager
def open_run(config: TrainConfig, *, task: Task, world: World) -> Iterator[Path]:
    """Make the run folder, or check that a resumed run fits it; hold it against a second training. Yields its path.

    Evaluate and score may run beside. Raises ConfigError when the folder is taken and run.resume is off, or when a
    setting that shapes the model or the order of batches differs from the run's; DataError when another process trains
    in it.
    """
    run_dir = Path(config.run.dir)
    _check_fits(config, task)
    dist.barrier()  # no rank writes before all have looked
    with ExitStack() as held:
        if world.is_main:
            remedy = "wait until it has ended, or give another run.dir"
            held.enter_context(hold_folder(run_dir, job="training", remedy=remedy))
            _check_fits(config, task)  # again: another may have begun and ended since
            Checkpoints(run_dir, world=world).sweep()
            _describe(config, task)
        dist.barrier()
        yield run_dir


def _check_fits(config: TrainConfig, task: Task) -> None:
    run_dir = Path(config.run.dir)
    known = run_dir / CONFIG
    if not known.exists():
        return
    if not config.run.resume:
        raise ConfigError(
            f"{run_dir} holds a run already: set run.resume=true to go on, or another run.dir to start a new one"
        )
    _check_same(read_config(run_dir), config, where=known)
    was, now = read_tables(run_dir)["store"], task.store.manifest.hash
    if was != now:
        raise ConfigError(
            f"store {task.store.path} is not the one {run_dir} was trained on (manifest {was[:12]}, "
            f"now {now[:12]}): give the old store, or start a new run with another run.dir"
        )


def _describe(config: TrainConfig, task: Task) -> None:
    run_dir = Path(config.run.dir)
    digests = {name: task.vocabulary(name).digest(rows) for name, rows in task.rows.items()}
    write_checked(run_dir / TABLES, {"rows": task.rows, "ids": digests, "store": task.store.manifest.hash})
    saved = OmegaConf.structured(config)
    # Evaluate and score may be started from elsewhere, and after more days were appended.
    saved.data.store, saved.data.version = str(task.store.path.resolve()), task.store.version
    write_signed(run_dir / CONFIG, OmegaConf.to_yaml(saved, resolve=True))


def read_config(run: str | Path) -> TrainConfig:
    """The config of a run. Raises CheckpointError where the folder is no run, or the file damaged or no plain data."""
    path = Path(run) / CONFIG
    if not path.exists():
        raise CheckpointError(f"{run!s} is not a run folder (no {CONFIG}): give run=DIR, the run.dir of train.py")
    try:
        loaded = OmegaConf.create(read_signed(path))
        for key, value in strings_of(OmegaConf.to_container(loaded, resolve=False)):
            if "${" in value:
                raise CheckpointError(f"{path}: {key} is {value!r}: a run's config holds values, not ${{...}}")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), loaded))
    except DataError as error:
        raise CheckpointError(str(error)) from error
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is no config of a run: {error}") from error


def read_tables(run: str | Path) -> dict[str, Any]:
    """RUN/tables.json: rows of each table, digests of their ids, hash of the store. Raises CheckpointError."""
    try:
        return read_checked(Path(run) / TABLES)
    except FileNotFoundError:
        raise CheckpointError(f"{run!s} has no {TABLES}: restore it from a copy of the run") from None
    except DataError as error:
        raise CheckpointError(f"{error}: restore it from a copy of the run") from error


def model_fingerprint(run: str, *, step: int, config: TrainConfig, world: World) -> str:
    """Of a checkpoint's weights, dense and tables, and of the settings that make a model of them; hexadecimal."""
    settings = {key: value for key, value in _settings(config).items() if key.startswith(SHAPE)}
    about = [Checkpoints(Path(run), world=world).fingerprint(step), settings]
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def open_task(config: TrainConfig, run: str | Path, *, world: World, store: str = "") -> Task:
    """The task of a trained run, with its tables' rows, on its own store or another. Collective.

    config: the run's, with changes to what does not shape the model. Raises ConfigError for a store with other ids.
    """
    tables = read_tables(run)
    task = make_task(config, world=world, store=store, rows=tables["rows"])
    task.require_same_ids(tables.get("ids", {}))
    return task


def load_model(
    run: str,
    *,
    checkpoint: str,
    world: World,
    parallel: ParallelConfig,
    store: str = "",
    config: TrainConfig | None = None,
    check: Callable[[Task], None] = lambda task: None,
) -> tuple[Task, nn.Module, int]:
    """Rebuild a run's model on this world and load a checkpoint: "best", "last" or a step number.

    store: another than the run's, or the run's in its newest version. config: the run's, with changes to what does
    not shape the model. check: called with the task before anything is built. Returns (task, unwrapped sharded model
    in eval mode, step). Raises NonFiniteError for weights that are no numbers.
    """
    config = config or read_config(run)
    task = open_task(config, run, world=world, store=store)
    check(task)
    checkpoints = Checkpoints(Path(run), world=world)
    step = choose_step(checkpoints, checkpoint)
    checkpoints.marker(step)  # refuse a half-written one before anything is built
    model = task.build_model()
    attach_table_optimizers(model, config.optim)  # their kernels hold the tables; nothing is trained
    sharded = shard(model, world=world, config=parallel, seed=config.run.seed)
    _load_finite(checkpoints, step, sharded)
    return task, sharded.module.eval(), step


def load_whole_model(
    run: str | Path, *, checkpoint: str, device: torch.device, store: str = ""
) -> tuple[Task, nn.Module, int]:
    """As load_model, for one process without a process group: the model has its tables whole, as plain modules."""
    world, config = World(rank=0, size=1, device=device), read_config(run)
    config.parallel.host_init_gib = math.inf  # tables on meta are for sharding
    task = open_task(config, run, world=world, store=store)
    checkpoints = Checkpoints(Path(run), world=world)
    step = choose_step(checkpoints, checkpoint)
    model = task.build_model()
    _load_finite(checkpoints, step, model)
    return task, model.to(device).eval(), step


def _load_finite(checkpoints: Checkpoints, step: int, model: nn.Module) -> None:
    checkpoints.load(step, model)
    try:
        require_finite_state(model.state_dict(), checkpoints.world)
    except NonFiniteError as error:
        raise NonFiniteError(f"{checkpoints.folder(step)}: {error}; give another checkpoint=STEP") from None


def choose_step(checkpoints: Checkpoints, which: str) -> int:
    """The step of "best", "last" or a number. Raises CheckpointError where there is none. Collective."""
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
    was, now = _settings(old), _settings(new)
    for key in was:
        if key.startswith(FIXED) and was[key] != now[key]:
            raise ConfigError(
                f"{key} is {now[key]!r}, but {where} was trained with {was[key]!r}: "
                f"set {key}={was[key]} to resume, or another run.dir to start a new run"
            )


def _settings(config: TrainConfig) -> dict[str, Any]:
    return _flat(OmegaConf.to_container(OmegaConf.structured(config)))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        flat.update(_flat(value, path + ".") if isinstance(value, dict) else {path: value})
    return flat
