"""suite=streaming: what a new event costs a user with a long past, and what a whole long past costs.

Folds: per number of past events one state; a call folds one event into it, reads the user embedding and ranks the
catalogue. A sample is as many calls in a row as a chunk has events, so that each sees an open chunk of every length.
Samples of all lengths take turns, in an order that rotates.
Passes: one user's whole history through `step`, in a process of its own per length, whose resident memory is watched.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from elastic_rec.feature_store.utils.progress import peak_memory_bytes
from elastic_rec.models.towers.base import build_tower
from elastic_rec.models.towers.elastic.causal_tower import CausalTower
from elastic_rec.models.towers.elastic.state import UserState
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig
from elastic_rec.pipeline.reports.benchmarks.record import Record
from elastic_rec.pipeline.reports.benchmarks.streaming_report import Fold, Pass, judge, last_figures, write
from elastic_rec.pipeline.runtime.allocator import keep_freed_memory
from elastic_rec.pipeline.runtime.errors import ConfigError

TOP_K = 10


def run(config: BenchmarkConfig, *, device: str, out: Path, say: Callable[[str], None]) -> tuple[dict, list[str]]:
    """Measures, writes OUT/streaming.{json,md}; returns (figures for the last line, missed targets)."""
    if device != "cpu":
        raise ConfigError("suite=streaming watches the memory of a process, not of a GPU: set device=cpu")
    config.model = replace(config.model, tower="elastic_causal")
    if config.threads:
        torch.set_num_threads(config.threads)
    record = Record(
        "streaming",
        out,
        ("json", "md"),
        threads=torch.get_num_threads(),
        allocator=keep_freed_memory(),
        model=asdict(config.model),
        memory=asdict(config.memory),
        streaming=asdict(config.streaming),
        seed=config.seed,
    )
    folds = measure_folds(config, say=say)
    passes = [_in_child(config, events, say=say) for events in config.streaming.pass_events]
    verdicts = judge(folds, passes, config.streaming.targets)
    record.stop()
    write(record, folds, passes, verdicts)
    return record.last_line(last_figures(folds, passes), verdicts)


def build(config: BenchmarkConfig) -> CausalTower:
    torch.manual_seed(config.seed)
    return build_tower(config.model, config.memory).eval()


def draw_events(config: BenchmarkConfig, num_events: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (N, D) and int64 times: other events for another seed, the same for another length."""
    g = torch.Generator().manual_seed(config.seed)
    gaps_s = torch.randint(0, 7200, (num_events,), generator=g)
    return torch.randn(num_events, config.model.width, generator=g), 1_600_000_000 + gaps_s.cumsum(0)


@torch.no_grad()
def measure_folds(config: BenchmarkConfig, *, say: Callable[[str], None]) -> list[Fold]:
    suite, tower = config.streaming, build(config)
    catalogue_VD = torch.randn(suite.catalogue, config.model.width)
    folds, states = [], []
    for events in suite.events:
        tokens_TD, times_s_T = draw_events(config, events)
        _, state = tower.step(tokens_TD, torch.tensor([0, events]), times_s_T, tower.init_state(1), False)
        folds.append(Fold(events, state.to_bytes().shape[1]))
        states.append((state, int(times_s_T[-1])))
    new_CD = torch.randn(config.model.chunk, config.model.width)
    for turn in range(suite.repetitions + 1):
        shift = turn % len(folds)
        for number in [*range(shift, len(folds)), *range(shift)]:
            seconds = _fold_all(tower, *states[number], new_CD, catalogue_VD)
            if turn:  # the first round warms up
                folds[number].samples_s.append(seconds)
    for fold in folds:
        say(f"fold after {fold.events:,}: {fold.seconds * 1e3:.2f} ms, state {fold.state_bytes:,} bytes")
    return folds


def _fold_all(tower: CausalTower, state: UserState, newest_s: int, new_CD, catalogue_VD) -> float:
    """Seconds per event of one new event after another."""
    one_B1 = torch.tensor([0, 1])
    start = time.perf_counter()
    for number, token_1D in enumerate(new_CD.split(1)):
        output, state = tower.step(token_1D, one_B1, torch.tensor([newest_s + 60 * (number + 1)]), state, False)
        (output.user_embedding @ catalogue_VD.T).topk(TOP_K)
    return (time.perf_counter() - start) / len(new_CD)


def _in_child(config: BenchmarkConfig, events: int, *, say: Callable[[str], None]) -> Pass:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_pass, args=(sender, config, events), daemon=True)
    child.start()
    sender.close()
    try:
        measured = Pass(events, *receiver.recv())
    except EOFError:
        child.join()
        raise RuntimeError(f"the pass over {events:,} events ended with exit code {child.exitcode}") from None
    child.join()
    say(f"pass over {events:,}: {measured.seconds:.3g} s, {measured.peak_rss_bytes / 2**30:.2f} GiB resident at most")
    return measured


@torch.no_grad()
def _pass(sender, config: BenchmarkConfig, events: int) -> None:
    keep_freed_memory()
    if config.threads:
        torch.set_num_threads(config.threads)
    suite, tower = config.streaming, build(config)
    tokens_TD, times_s_T = draw_events(config, events)
    samples_s: list[float] = []
    while len(samples_s) <= suite.pass_repetitions:
        start = time.perf_counter()
        tower.step(tokens_TD, torch.tensor([0, events]), times_s_T, tower.init_state(1), False)
        samples_s.append(time.perf_counter() - start)
    sender.send((peak_memory_bytes(), samples_s[1:]))
