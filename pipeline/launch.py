"""What every verb shares: typed config, process group, errors, and the JSON on the last line.

    @verb("train", TrainConfig, distributed=True)
    def main(config: TrainConfig, world: World) -> dict: ...

Known mistakes of a user (DataError, ConfigError, CheckpointError) end as one message on stderr and exit code 2;
a wrong or unknown config key is Hydra's own message and exit code 1; anything else is a traceback and exit code 1.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import hydra
import torch
import torch.distributed as dist
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

import elastic_rec.configs
from elastic_rec.feature_store.datasets import DatasetUnavailable
from elastic_rec.feature_store.errors import DataError
from elastic_rec.pipeline.allocator import keep_freed_memory
from elastic_rec.pipeline.errors import CheckpointError, ConfigError, NonFiniteLossError

CONFIG_DIR = str(Path(elastic_rec.configs.__file__).parent.resolve())
USER_ERRORS = (DataError, ConfigError, CheckpointError, NonFiniteLossError)
EXIT_UNAVAILABLE = 3  # a public data set that no source offers right now


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, text: str) -> None:
        """A line for the person watching: stderr, rank 0 only; stdout is kept for the result."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)


def verb(name: str, schema: type, *, distributed: bool = False) -> Callable:
    """Make `main(config[, world]) -> figures` a command with Hydra overrides.

    The decorated function's dataclass config is composed from configs/{name}.yaml and checked against
    `schema` before anything is built. Its returned dict is printed by rank 0 as the last line on stdout.
    """
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)

    def decorate(main: Callable[..., dict[str, Any]]) -> Callable[[], None]:
        composed = False

        def task(raw: DictConfig) -> None:
            nonlocal composed
            composed = True
            try:
                config = _typed(raw)
                if not distributed:
                    figures, is_main = main(config), True
                else:
                    world = start_world(config.parallel.device)
                    is_main = world.is_main
                    figures = main(config, world)
                    dist.barrier()
            except USER_ERRORS as error:
                _fail(error)
            if is_main:
                print(json.dumps(figures, default=str), flush=True)
            if dist.is_initialized():
                dist.destroy_process_group()

        command = hydra.main(version_base="1.3", config_path=CONFIG_DIR, config_name=name)(task)

        def checked() -> None:
            try:
                command()
            except SystemExit as stop:
                # Hydra has printed what is wrong with the config, but its advice (+key=value) does not help here.
                if stop.code and not composed:
                    print("all keys, types and defaults: docs/reference/config.md, or --help", file=sys.stderr)
                raise

        return checked

    return decorate


def _typed(raw: DictConfig) -> Any:
    """DictConfig -> dataclass; a failed cross-field check in __post_init__ becomes a ConfigError."""
    try:
        return OmegaConf.to_object(raw)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _fail(error: Exception) -> None:
    rank = os.environ.get("RANK")
    prefix = f"error [rank {rank}]" if rank is not None else "error"
    print(f"{prefix}: {error}", file=sys.stderr, flush=True)
    # Skip destroy_process_group: peers may be inside a collective; torchrun ends them when this rank exits.
    sys.stdout.flush()
    os._exit(EXIT_UNAVAILABLE if isinstance(error, DatasetUnavailable) else 2)


def start_world(device: str = "auto") -> World:
    """Join torchrun's process group, or make a group of one in a plain `python` process.

    device: "auto" (CUDA where there is one), "cpu" or "cuda".
    Raises ConfigError when CUDA is asked for and absent.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("parallel.device=cuda, but torch sees no CUDA device here; use parallel.device=cpu or auto")
    keep_freed_memory()
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda:
        torch.cuda.set_device(local_rank)
    where = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    backend = "nccl" if use_cuda else "gloo"
    timeout = timedelta(minutes=30)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(rank=dist.get_rank(), size=dist.get_world_size(), device=where)
