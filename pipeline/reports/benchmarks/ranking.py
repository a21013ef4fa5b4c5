"""suite=ranking: what more candidates cost, and what a longer history costs a request that has its user's state.

Lists: one user's history is encoded and read by 1 to 1,000 candidates. Beside it: DIN over the same events, and the
cross network and MLP that come after either.
States: for each number of past events a user's state is read, without a new event, and the candidates are scored.
All calls take turns; vectors and weights are random.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import torch

from elastic_rec.models.ranking.config import RankingConfig
from elastic_rec.models.ranking.histories import CAUSAL_VIEWS, CausalHistory
from elastic_rec.models.ranking.model import CandidateFeatures, Heads
from elastic_rec.models.ranking.target_attention import EventReader
from elastic_rec.models.towers.elastic.state import UserState
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig, RankingTargets
from elastic_rec.pipeline.reports.benchmarks.figures import Timed, Verdict, at_most, in_turns, markdown_table
from elastic_rec.pipeline.reports.benchmarks.streaming import draw_events
from elastic_rec.pipeline.reports.benchmarks.suite import Log, Report

CALLS = 4  # in a sample


@dataclass
class Timing(Timed):
    """name: tower, din, heads or state. samples_s: seconds per call."""

    name: str
    events: int
    candidates: int
    samples_s: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, int]:
        """(name, events, candidates), one of a kind."""
        return self.name, self.events, self.candidates


def measure(config: BenchmarkConfig, device: str, log: Log) -> Iterator[Report]:
    """One report, of all lists and states."""
    timings = measure_all(config, log)
    yield Report(
        figures=last_figures(timings),
        samples={"cells": [asdict(timing) for timing in timings]},
        verdicts=judge(timings, config.ranking.targets),
        lines=_lines(config, timings),
    )


@torch.no_grad()
def measure_all(config: BenchmarkConfig, log: Log) -> list[Timing]:
    """A timing per list and state, each with a sample per round."""
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
    timings = [Timing(*key) for key in calls]
    for turn, timing in in_turns(timings, suite.repetitions + 1):
        seconds = _seconds_each(calls[timing.key])
        if turn:  # the first round warms up
            timing.samples_s.append(seconds)
    for timing in timings:
        log(f"{timing.name}, {timing.events:,} events, {timing.candidates:,} candidates: {timing.seconds * 1e3:.2f} ms")
    return timings


def _seconds_each(calls: list[Callable[[], object]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) / len(calls)


def _tower_call(config: BenchmarkConfig, history: CausalHistory, candidates: int) -> Callable[[], object]:
    """The user's events encoded, and read by the candidates of one impression after all of them."""
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
    """The other inputs of the heads: candidates and gap. There are no attributes, so no batch is needed."""
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


def by_candidates(timings: list[Timing], name: str) -> dict[int, float]:
    """Number of candidates -> seconds."""
    return {timing.candidates: timing.seconds for timing in timings if timing.name == name}


def by_events(timings: list[Timing], candidates: int) -> dict[int, float]:
    """Number of past events -> seconds of scoring so many candidates from a state."""
    return {t.events: t.seconds for t in timings if t.name == "state" and t.candidates == candidates}


def candidates_ratio(timings: list[Timing], name: str) -> float:
    """Time of the longest list over that of the shortest."""
    seconds = list(by_candidates(timings, name).values())
    return seconds[-1] / seconds[0]


def state_lists(timings: list[Timing]) -> list[int]:
    """Numbers of candidates that were scored from states: the shortest list and the longest."""
    return sorted({timing.candidates for timing in timings if timing.name == "state"})


def state_ratio(timings: list[Timing]) -> float:
    """Slowest over fastest number of past events, of the list where it is greater."""
    found = [by_events(timings, candidates).values() for candidates in state_lists(timings)]
    return max(max(seconds) / min(seconds) for seconds in found)


def judge(timings: list[Timing], targets: RankingTargets) -> list[Verdict]:
    """A verdict per target that is on."""
    lists, states = list(by_candidates(timings, "tower")), list(by_events(timings, state_lists(timings)[0]))
    list_name = f"tower time of {lists[-1]:,} candidates over that of {lists[0]:,}"
    state_name = f"scoring from the state of {states[0]:,} to {states[-1]:,} events, slowest over fastest"
    return [
        *at_most(list_name, targets.candidates_ratio, candidates_ratio(timings, "tower"), "x"),
        *at_most(state_name, targets.state_ratio, state_ratio(timings), "x"),
    ]


def last_figures(timings: list[Timing]) -> dict:
    """Milliseconds by number of candidates, and for states by number of past events; ratios."""

    def rounded(found: dict[int, float]) -> dict[int, float]:
        return {number: round(seconds * 1e3, 3) for number, seconds in found.items()}

    return {
        "tower_ms": rounded(by_candidates(timings, "tower")),
        "candidates_ratio": round(candidates_ratio(timings, "tower"), 3),
        "din_ms": rounded(by_candidates(timings, "din")),
        "heads_ms": rounded(by_candidates(timings, "heads")),
        "state_ms": {candidates: rounded(by_events(timings, candidates)) for candidates in state_lists(timings)},
        "state_ratio": round(state_ratio(timings), 3),
    }


def _lines(config: BenchmarkConfig, timings: list[Timing]) -> list[str]:
    suite, lists = config.ranking, state_lists(timings)
    columns = [by_candidates(timings, name) for name in ("tower", "din", "heads")]
    state_columns = [by_events(timings, number) for number in lists]
    return [
        f"One user; medians of {suite.repetitions} rounds in which all calls take turns.",
        "",
        f"A history of {suite.events:,} events is encoded and read by the candidates of one impression (tower). Beside "
        "it: DIN over the same events, and the cross network and MLP that come after either.",
        "",
        *markdown_table(("candidates", "tower", "DIN", "cross network and MLP"), _ms_rows(columns)),
        "",
        f"Longest list over shortest: tower {candidates_ratio(timings, 'tower'):.2f}, DIN "
        f"{candidates_ratio(timings, 'din'):.1f}.",
        "",
        "A user with a state and no new event: interests out of the state, target attention, cross network and MLP.",
        "",
        *markdown_table(("past events", *(f"{number:,} candidates" for number in lists)), _ms_rows(state_columns)),
        "",
        f"Slowest over fastest: {state_ratio(timings):.2f}.",
    ]


def _ms_rows(columns: list[dict[int, float]]) -> list[list[str]]:
    return [[f"{number:,}", *(f"{column[number] * 1e3:.2f} ms" for column in columns)] for number in columns[0]]
