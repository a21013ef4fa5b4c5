"""suite=ranking: what more candidates cost, and what a longer history costs a request that has its user's state.

Lists: one user's history, encoded, and read by 1 to 1,000 candidates; DIN over the same events beside it, and what
comes behind either (cross network and MLP). States: per number of past events a user's state is read, without a new
event, and the candidates scored. All cells take turns, in an order that rotates; vectors and weights are random.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from elastic_rec.models.ranking.config import RankingConfig
from elastic_rec.models.ranking.histories import CAUSAL_VIEWS, CausalHistory
from elastic_rec.models.ranking.model import CandidateFeatures, Heads
from elastic_rec.models.ranking.target_attention import EventReader
from elastic_rec.models.towers.elastic.state import UserState
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig
from elastic_rec.pipeline.reports.benchmarks.ranking_report import Cell, judge, last_figures, write
from elastic_rec.pipeline.reports.benchmarks.record import Record
from elastic_rec.pipeline.reports.benchmarks.streaming import draw_events
from elastic_rec.pipeline.runtime.allocator import keep_freed_memory
from elastic_rec.pipeline.runtime.errors import ConfigError

CALLS = 4  # in a sample


def run(config: BenchmarkConfig, *, device: str, out: Path, say: Callable[[str], None]) -> tuple[dict, list[str]]:
    """Measures, writes OUT/ranking.{json,md}; returns (figures for the last line, missed targets)."""
    if device != "cpu":
        raise ConfigError("suite=ranking reads a CPU's clock: set device=cpu")
    config.model = replace(config.model, tower="elastic_causal")
    if config.threads:
        torch.set_num_threads(config.threads)
    record = Record(
        "ranking",
        out,
        ("json", "md"),
        threads=torch.get_num_threads(),
        allocator=keep_freed_memory(),
        model=asdict(config.model),
        memory=asdict(config.memory),
        ranking=asdict(config.ranking),
        seed=config.seed,
    )
    cells = measure(config, say=say)
    verdicts = judge(cells, config.ranking.targets)
    record.stop()
    write(record, cells, verdicts)
    return record.last_line(last_figures(cells), verdicts)


@torch.no_grad()
def measure(config: BenchmarkConfig, *, say: Callable[[str], None]) -> list[Cell]:
    suite, width = config.ranking, config.model.width
    torch.manual_seed(config.seed)
    history = CausalHistory(config.model, config.memory).eval()
    din = EventReader(width, last_n=suite.events).eval()
    heads = Heads(RankingConfig(), CAUSAL_VIEWS, CandidateFeatures([], []), width=width, num_labels=1).eval()
    calls: dict[tuple[str, int, int], list[Callable[[], object]]] = {}
    for candidates in suite.candidates:
        calls["tower", suite.events, candidates] = [_tower_call(config, history, candidates)] * CALLS
        calls["din", suite.events, candidates] = [_din_call(config, din, candidates)] * CALLS
        calls["heads", 0, candidates] = [_heads_call(heads, candidates, width)] * CALLS
    for events in suite.state_events:
        states = _states(config, history, events)
        for candidates in (suite.candidates[0], suite.candidates[-1]):
            state_calls = [_state_call(config, history, heads, state, candidates) for state in states]
            calls["state", events, candidates] = state_calls
    cells = [Cell(*key) for key in calls]
    for turn in range(suite.repetitions + 1):
        shift = turn % len(cells)
        for number in [*range(shift, len(cells)), *range(shift)]:
            seconds = _seconds_each(calls[cells[number].key])
            if turn:  # the first round warms up
                cells[number].samples_s.append(seconds)
    for cell in cells:
        say(f"{cell.name}, {cell.events:,} events, {cell.candidates:,} candidates: {cell.seconds * 1e3:.2f} ms")
    return cells


def _seconds_each(calls: list[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def _tower_call(config: BenchmarkConfig, history: CausalHistory, candidates: int) -> Callable[[], object]:
    """The user's events encoded, and read by the candidates of one impression behind all of them."""
    events, one = config.ranking.events, torch.zeros(1, dtype=torch.int64)
    tokens_TD, times_s_T = draw_events(config, events)
    offsets_B1, candidates_CD = torch.tensor([0, events]), torch.randn(candidates, config.model.width)
    impression_C = one.expand(candidates)

    def call() -> torch.Tensor:
        output = history.tower(tokens_TD, offsets_B1, times_s_T, readings=(one, offsets_B1[1:]))
        return history.read(output, candidates_CD, impression_C)

    return call


def _din_call(config: BenchmarkConfig, din: EventReader, candidates: int) -> Callable[[], object]:
    one = torch.zeros(1, dtype=torch.int64)
    tokens_TD, _ = draw_events(config, config.ranking.events)
    candidates_CD = torch.randn(candidates, config.model.width)
    batch = SimpleNamespace(starts=one, ends=one + len(tokens_TD), impression=one.expand(candidates))
    return lambda: din(tokens_TD, candidates_CD, batch)


def _heads_call(heads: Heads, candidates: int, width: int) -> Callable[[], object]:
    read_C3D, rest = torch.randn(candidates, 3, width), _rest(candidates, width)
    return lambda: heads(rest[0], read_C3D, *rest[1:])


def _rest(candidates: int, width: int) -> tuple:
    """What heads see beside what was read: candidates, gap; no attributes, hence no batch."""
    return torch.randn(candidates, width), torch.randn(candidates, 1, width), None, None, None


def _states(config: BenchmarkConfig, history: CausalHistory, events: int) -> list[UserState]:
    """After so many events and a few more: the work depends on how full the open chunk is."""
    more = config.model.chunk // CALLS
    tokens_TD, times_s_T = draw_events(config, events + (CALLS - 1) * more)
    states, state, done = [], history.tower.init_state(1), 0
    for end in range(events, len(times_s_T) + 1, max(more, 1)):
        offsets_B1 = torch.tensor([0, end - done])
        _, state = history.tower.step(tokens_TD[done:end], offsets_B1, times_s_T[done:end], state, False)
        states, done = [*states, state], end
    return states


def _state_call(
    config: BenchmarkConfig, history: CausalHistory, heads: Heads, state: UserState, candidates: int
) -> Callable[[], object]:
    """Interests out of a state, then attention, cross network and MLP."""
    width = config.model.width
    rest, impression_C = _rest(candidates, width), torch.zeros(candidates, dtype=torch.int64)
    nothing = (torch.zeros(0, width), torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))

    def call() -> torch.Tensor:
        output, _ = history.tower.step(*nothing, state, False)
        return heads(rest[0], history.read(output, rest[0], impression_C), *rest[1:])

    return call
