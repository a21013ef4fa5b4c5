"""suite=streaming: what a new event costs a user with a long past, and what a whole long past costs.

Folds: each number of past events has one state. A call folds one event into it, reads the user's summary and ranks the
catalogue. A sample is as many calls in a row as a chunk has events, so that each sees an open chunk of every length.
Samples of all lengths take turns.
Passes: one user's whole history through `step`. Each length has its own process, whose resident memory is watched.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field

import torch

from elastic_rec.feature_store.utils.progress import peak_memory_bytes
from elastic_rec.models.towers.base import build_tower
from elastic_rec.models.towers.elastic.causal_tower import CausalTower
from elastic_rec.models.towers.elastic.state import UserState
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig, StreamingTargets
from elastic_rec.pipeline.reports.benchmarks.figures import (
    Timed,
    Verdict,
    at_most,
    between,
    in_turns,
    log_log_slope,
    markdown_table,
)
from elastic_rec.pipeline.reports.benchmarks.suite import Log, Report
from elastic_rec.pipeline.runtime.allocator import keep_freed_memory

TOP_K = 10


@dataclass
class Fold(Timed):
    """A new event after `events` others. state_bytes: of the user's state in storage. samples_s: seconds per event."""

    events: int
    state_bytes: int
    samples_s: list[float] = field(default_factory=list)


@dataclass
class Pass(Timed):
    """A whole history. peak_rss_bytes: of the process, with interpreter, libraries and the events themselves."""

    events: int
    peak_rss_bytes: int
    samples_s: list[float]


def measure(config: BenchmarkConfig, device: str, log: Log) -> Iterator[Report]:
    """One report, of all folds and passes."""
    folds = measure_folds(config, log)
    passes = [_in_child(config, events, log) for events in config.streaming.pass_events]
    yield Report(
        figures=last_figures(folds, passes),
        samples={"folds": [asdict(fold) for fold in folds], "passes": [asdict(row) for row in passes]},
        verdicts=judge(folds, passes, config.streaming.targets),
        lines=_lines(config, folds, passes),
    )


def build(config: BenchmarkConfig) -> CausalTower:
    """The tower with random weights, for inference."""
    torch.manual_seed(config.seed)
    return build_tower(config.model, config.memory).eval()


def draw_events(config: BenchmarkConfig, num_events: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors (N, D) and int64 times in seconds. They depend on the seed, and on the length only by being cut."""
    g = torch.Generator().manual_seed(config.seed)
    gaps_s = torch.randint(0, 7200, (num_events,), generator=g)
    return torch.randn(num_events, config.model.width, generator=g), 1_600_000_000 + gaps_s.cumsum(0)


@torch.no_grad()
def measure_folds(config: BenchmarkConfig, log: Log) -> list[Fold]:
    """A fold per number of past events, each with a sample per round."""
    suite, tower = config.streaming, build(config)
    catalogue_VD = torch.randn(suite.catalogue, config.model.width)
    folds, states = [], []
    for events in suite.events:
        tokens_TD, times_s_T = draw_events(config, events)
        _, state = tower.step(tokens_TD, torch.tensor([0, events]), times_s_T, tower.init_state(1), False)
        folds.append(Fold(events, state.to_bytes().shape[1]))
        states.append((state, int(times_s_T[-1])))
    new_CD = torch.randn(config.model.chunk, config.model.width)
    for turn, number in in_turns(range(len(folds)), suite.repetitions + 1):
        seconds = _fold_all(tower, *states[number], new_CD, catalogue_VD)
        if turn:  # the first round warms up
            folds[number].samples_s.append(seconds)
    for fold in folds:
        log(f"fold after {fold.events:,}: {fold.seconds * 1e3:.2f} ms, state {fold.state_bytes:,} bytes")
    return folds


def _fold_all(tower: CausalTower, state: UserState, newest_s: int, new_CD, catalogue_VD) -> float:
    """Seconds per event of one new event after another."""
    one_B1 = torch.tensor([0, 1])
    start = time.perf_counter()
    for number, token_1D in enumerate(new_CD.split(1)):
        output, state = tower.step(token_1D, one_B1, torch.tensor([newest_s + 60 * (number + 1)]), state, False)
        (output.user_embedding @ catalogue_VD.T).topk(TOP_K)
    return (time.perf_counter() - start) / len(new_CD)


def _in_child(config: BenchmarkConfig, events: int, log: Log) -> Pass:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        try:
            measured = child.submit(_pass, config, events).result()
        except BrokenProcessPool:
            raise RuntimeError(f"the process of the pass over {events:,} events died, perhaps for memory") from None
    log(f"pass over {events:,}: {measured.seconds:.3g} s, {measured.peak_rss_bytes / 2**30:.2f} GiB resident at most")
    return measured


@torch.no_grad()
def _pass(config: BenchmarkConfig, events: int) -> Pass:
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
    return Pass(events, peak_memory_bytes(), samples_s[1:])


def fold_ratio(folds: list[Fold]) -> float:
    """Time of the slowest fold over that of the fastest."""
    return max(fold.seconds for fold in folds) / min(fold.seconds for fold in folds)


def slope(passes: list[Pass]) -> float | None:
    """Log-log slope of a pass's time against its events."""
    return log_log_slope((row.events, row.seconds) for row in passes)


def judge(folds: list[Fold], passes: list[Pass], targets: StreamingTargets) -> list[Verdict]:
    """A verdict per target that is on, and one on the sizes of states, which must be equal."""
    sizes, longest = {fold.state_bytes for fold in folds}, passes[-1]
    span = f"{folds[0].events:,} to {folds[-1].events:,}"
    return [
        *at_most(f"a new event after {span}, slowest over fastest", targets.fold_ratio, fold_ratio(folds), "x"),
        Verdict("different sizes of a state in bytes", "1", len(sizes), len(sizes) == 1),
        *at_most(
            f"resident memory of a pass over {longest.events:,} events, GiB",
            targets.pass_gib,
            longest.peak_rss_bytes / 2**30,
        ),
        *between("log-log slope of a pass's time", targets.slope_min, targets.slope_max, slope(passes)),
    ]


def last_figures(folds: list[Fold], passes: list[Pass]) -> dict:
    """By number of events: milliseconds of a fold, seconds and GiB of a pass."""
    return {
        "fold_ms": {fold.events: round(fold.seconds * 1e3, 3) for fold in folds},
        "fold_ratio": fold_ratio(folds),
        "state_bytes": sorted({fold.state_bytes for fold in folds}),
        "pass_s": {row.events: round(row.seconds, 4) for row in passes},
        "pass_peak_rss_gib": {row.events: round(row.peak_rss_bytes / 2**30, 2) for row in passes},
        "pass_slope": slope(passes),
    }


def _lines(config: BenchmarkConfig, folds: list[Fold], passes: list[Pass]) -> list[str]:
    suite = config.streaming
    fold_rows = [(f"{fold.events:,}", f"{fold.seconds * 1e3:.2f} ms", f"{fold.state_bytes:,}") for fold in folds]
    pass_rows = [
        (
            f"{row.events:,}",
            f"{row.seconds:.3g} s",
            f"{row.seconds / row.events * 1e6:.2f} µs",
            f"{row.peak_rss_bytes / 2**30:.2f} GiB",
        )
        for row in passes
    ]
    return [
        f"A fold puts a new event into one user's state, then ranks {suite.catalogue:,} items for the summary and "
        f"takes the best {TOP_K}. Median of {suite.repetitions} rounds in which lengths take turns, "
        f"{config.model.chunk} folds per sample.",
        "",
        *markdown_table(("past events", "fold and rescore", "bytes of the state"), fold_rows),
        "",
        f"Slowest over fastest: {fold_ratio(folds):.2f}.",
        "",
        f"A pass turns a whole history into a state, in its own process; median of {suite.pass_repetitions}.",
        "",
        *markdown_table(("events", "time", "per event", "resident memory of the process, at most"), pass_rows),
    ]
