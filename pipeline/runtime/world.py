"""The processes of a run, and this one's place among them: torchrun's process group, or a group of one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from elastic_rec.pipeline.runtime import interrupts
from elastic_rec.pipeline.runtime.allocator import keep_freed_memory
from elastic_rec.pipeline.runtime.endings import EXIT_LOST_RANK, Ending, end, ending_of, quit_now
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.pulse import Pulse

Value = TypeVar("Value")
_BROKEN = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting|gloo/transport|"
    r"ncclRemoteError|ncclSystemError|NCCL communicator was aborted|Socket Timeout|wait timeout|failed to recv"
)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    pulse: Pulse = field(default_factory=Pulse, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def log(self, text: str) -> None:
        """A line for the person watching: stderr, rank 0 only; stdout is kept for the result."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    def of_all(self, value: Value) -> list[Value]:
        """Every rank's value, by rank, on every rank. Collective."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def agreed(self, value: Value) -> Value:
        """Rank 0's value on every rank. Collective."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]


def of_each_rank(world: World, table_2N: np.ndarray, about: int) -> Iterator[tuple[np.ndarray, int]]:
    """(table, number) of every rank in turn, so that memory does not grow with the ranks. Collective.

    table_2N: this rank's, int64; N may differ. about: this rank's number.
    """
    for rank in range(world.size):
        head = torch.tensor([table_2N.shape[1], about], device=world.device)
        dist.broadcast(head, src=rank)
        size, number = head.tolist()
        found = torch.zeros(2, size, dtype=torch.int64, device=world.device)
        if rank == world.rank:
            found.copy_(torch.from_numpy(table_2N))
        dist.broadcast(found, src=rank)
        yield found.cpu().numpy(), number


def run_in_world(main: Callable[..., dict[str, Any]], config: Any, *, report: Callable[[dict[str, Any]], None]) -> None:
    """main(config, world) on every rank; report(its figures) on rank 0, when all are through.

    After an error the first rank to fail says why. The others, whose collectives break, end without a word.
    """
    world = start_world(config.parallel.device, timeout_s=config.parallel.timeout_s)
    try:
        try:
            figures = main(config, world)
            dist.barrier()
        except BaseException as error:
            _leave(error, world)
            raise
    except interrupts.Interrupted as error:  # torchrun ends this rank, too, while it tells why it ends
        _leave(error, world)
    if world.is_main:
        report(figures)
    dist.destroy_process_group()


def _leave(error: BaseException, world: World) -> None:
    """Ends the process, unless the error is a fault of the program: then its traceback is wanted, once."""
    with interrupts.deferred():
        pulse = world.pulse
        if _is_broken(error) and world.size > 1:
            line = (
                f"error: {pulse.await_ending()} ended without a word (killed? out of memory? see dmesg there); this "
                f"rank stood at {pulse.at}. Run again with run.resume=true"
            )
            ending = Ending(EXIT_LOST_RANK, line)
        else:
            ending = ending_of(error)
        followed = pulse.ends_first(ending.code if ending else 1)
        if followed is not None:
            quit_now(followed)
        if ending:
            end(ending, rank=world.rank, size=world.size)


def _is_broken(error: BaseException) -> bool:
    """Is it what a collective says when another rank has gone?"""
    return (isinstance(error, RuntimeError | CheckpointException) and _BROKEN.search(str(error)) is not None) or (
        error.__context__ is not None and isinstance(error, interrupts.Interrupted) and _is_broken(error.__context__)
    )


def start_world(device: str = "auto", *, timeout_s: float = 600.0) -> World:
    """Join torchrun's process group, or make a group of one in a plain `python` process.

    device: "auto" (CUDA where there is one), "cpu" or "cuda". timeout_s: how long a rank waits for another.
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
    # The pulse is to speak first: it knows who is missing.
    timeout = timedelta(seconds=timeout_s + 60)
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return World(rank=0, size=1, device=where)
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun keeps one store for all attempts: without a prefix, this one would find the addresses of the last.
    group = dist.PrefixStore(f"elastic-rec/group-{attempt}", store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=timeout)
    job = dist.PrefixStore("elastic-rec", store.clone())
    pulse = Pulse(job, attempt=attempt, rank=rank, size=size, timeout_s=timeout_s)
    return World(rank=rank, size=size, device=where, pulse=pulse)
