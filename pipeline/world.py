"""The processes of a run, and this one's place among them: torchrun's process group, or a group of one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from elastic_rec.pipeline.allocator import keep_freed_memory
from elastic_rec.pipeline.errors import ConfigError


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


def run_in_world(main: Callable[..., dict[str, Any]], config: Any, *, report: Callable[[dict[str, Any]], None]) -> None:
    """main(config, world) on every rank; report(its figures) on rank 0, when all are through."""
    world = start_world(config.parallel.device)
    figures = main(config, world)
    dist.barrier()
    if world.is_main:
        report(figures)
    dist.destroy_process_group()


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
