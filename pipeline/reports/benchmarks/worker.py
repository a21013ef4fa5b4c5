"""The process that measures. If it runs out of memory or is killed, the table says so and the run goes on.

Memory is limited by RLIMIT_AS on a CPU: address space, beyond what the process has at its start. On CUDA it is limited
by torch's per-process share.
Peak memory is the bytes that torch's own allocator hands out during a model's first call, above weights and events. On
a CPU they come from the profiler's allocation events, with temporaries inside kernels. On CUDA they are
torch.cuda.max_memory_allocated. Not counted: what MKL or oneDNN take for themselves, and what the allocator keeps.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from elastic_rec.pipeline.reports.benchmarks.models import Setup
from elastic_rec.pipeline.runtime.allocator import keep_freed_memory

OUT_OF_MEMORY = "out of memory"
SIGNS_OF_OOM = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


class Task(NamedTuple):
    """calls = 0: the first call, watched for its memory. calls > 0: a timed sample of so many calls."""

    model: str
    mode: str
    events: int
    calls: int


@dataclass(frozen=True)
class Reply:
    """seconds per call. status: "ok", or why there are no figures."""

    status: str
    seconds: float = 0.0
    peak_bytes: int = 0


class Worker:
    """The parent's end. `ask` answers whatever happens to the child; a dead child is replaced."""

    def __init__(self, setup: Setup, *, threads: int, memory_limit_gib: float):
        self._context = multiprocessing.get_context("spawn")
        self._arguments = (setup, threads, memory_limit_gib)
        self._start()

    def ask(self, task: Task, *, timeout_s: float) -> Reply:
        """Raises RuntimeError with the child's traceback where the call itself is at fault."""
        try:
            self._pipe.send(task)
            if not self._pipe.poll(timeout_s):
                self._replace()
                return Reply(f"stopped: no answer in {timeout_s:.0f} s")
            reply = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self._replace()
            if code == -signal.SIGKILL:  # the limit was above what the machine had left
                return Reply(f"{OUT_OF_MEMORY} (killed)")
            return Reply(f"crashed ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})")
        if isinstance(reply, str):
            raise RuntimeError(f"{task.model}, {task.mode}, {task.events} events:\n{reply}")
        return reply

    def describe(self) -> dict[str, Any]:
        """Threads, the device's name and the allocator, as the child sees them."""
        self._pipe.send(None)
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the child at once."""
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        self._pipe, child = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(child, *self._arguments), daemon=True)
        self._process.start()
        child.close()  # or a dead child's end would stay open here, and recv would wait forever

    def _replace(self) -> None:
        self.close()
        self._start()


def _serve(pipe: Connection, setup: Setup, threads: int, memory_limit_gib: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if threads:
        torch.set_num_threads(threads)
    allocator = keep_freed_memory()
    _ = setup.table_VD  # before the limit, which is on what a call allocates
    _limit_memory(setup.device, memory_limit_gib)
    gc.disable()
    os.environ["KINETO_LOG_LEVEL"] = "99"  # or the profiler writes a line to stderr at each start and stop
    calls: dict[tuple[str, str, int], Callable[[], None]] = {}
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            name = torch.cuda.get_device_name() if setup.device == "cuda" else "cpu"
            pipe.send({"threads": torch.get_num_threads(), "device": name, "allocator": allocator})
            continue
        try:
            reply = _measure(setup, task, calls)
        except Exception as error:
            if not _is_out_of_memory(error):
                reply = traceback.format_exc()
            else:
                reply = Reply(OUT_OF_MEMORY)
                calls.pop(task[:3], None)
        gc.collect()  # after the except: the error's frames held the tensors
        if setup.device == "cuda":
            torch.cuda.empty_cache()
        pipe.send(reply)


def _measure(setup: Setup, task: Task, calls: dict[tuple[str, str, int], Callable[[], None]]) -> Reply:
    if any(key[1:] != (task.mode, task.events) for key in calls):
        calls.clear()  # a new row of the table: the old models and events are no longer needed
    key = (task.model, task.mode, task.events)
    new = key not in calls
    if new:
        calls[key] = setup.call(*key)
    if task.calls and not new:
        return Reply("ok", _seconds(calls[key], task.calls, setup.device))
    peak_bytes, seconds = _watched_call(calls[key], setup.device)  # also warms up a worker that was replaced
    if task.calls or seconds < 1:  # the watched call was cold; for a long one it hardly matters
        seconds = _seconds(calls[key], max(1, task.calls), setup.device)
    return Reply("ok", seconds, peak_bytes)


def _seconds(call: Callable[[], None], times: int, device: str) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (time.perf_counter() - start) / times


def _watched_call(call: Callable[[], None], device: str) -> tuple[int, float]:
    """(peak bytes above the start, seconds)."""
    start = time.perf_counter()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    seconds = time.perf_counter() - start
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak, seconds


def _limit_memory(device: str, gib: float) -> None:
    limit = int(gib * 2**30)
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit + torch.cuda.memory_reserved()) / total))
    elif sys.platform == "linux":
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    else:
        print(f"memory_limit_gib is not enforced on {sys.platform}", file=sys.stderr)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS_OF_OOM)
    )


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
