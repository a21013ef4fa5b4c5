"""What the ranking suite measured, what follows from it, and its files for people (Markdown) and programs (JSON)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from elastic_rec.feature_store.utils.atomic_write import write_json, write_text
from elastic_rec.pipeline.reports.benchmarks.config import RankingTargets
from elastic_rec.pipeline.reports.benchmarks.record import Record, Verdict, target_table


@dataclass
class Cell:
    """name: tower, din, heads or state. samples_s: seconds per call."""

    name: str
    events: int
    candidates: int
    samples_s: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.events, self.candidates

    @property
    def seconds(self) -> float:
        return median(self.samples_s)


def by_candidates(cells: list[Cell], name: str) -> dict[int, float]:
    return {cell.candidates: cell.seconds for cell in cells if cell.name == name}


def by_events(cells: list[Cell], candidates: int) -> dict[int, float]:
    """Scoring so many candidates from a state."""
    return {cell.events: cell.seconds for cell in cells if cell.name == "state" and cell.candidates == candidates}


def candidates_ratio(cells: list[Cell], name: str) -> float:
    seconds = list(by_candidates(cells, name).values())
    return seconds[-1] / seconds[0]


def state_lists(cells: list[Cell]) -> list[int]:
    """Numbers of candidates that were scored from states: the shortest list and the longest."""
    return sorted({cell.candidates for cell in cells if cell.name == "state"})


def state_ratio(cells: list[Cell]) -> float:
    """Of the list where it is greater."""
    found = [by_events(cells, candidates).values() for candidates in state_lists(cells)]
    return max(max(seconds) / min(seconds) for seconds in found)


def judge(cells: list[Cell], targets: RankingTargets) -> list[Verdict]:
    verdicts = []
    if targets.candidates_ratio:
        numbers = list(by_candidates(cells, "tower"))
        ratio, bound = candidates_ratio(cells, "tower"), targets.candidates_ratio
        name = f"tower time of {numbers[-1]:,} candidates over that of {numbers[0]:,}"
        verdicts.append(Verdict(name, f"at most {bound:g}x", ratio, ratio <= bound))
    if targets.state_ratio:
        numbers = list(by_events(cells, state_lists(cells)[0]))
        ratio, bound = state_ratio(cells), targets.state_ratio
        name = f"scoring from the state of {numbers[0]:,} to {numbers[-1]:,} events, slowest over fastest"
        verdicts.append(Verdict(name, f"at most {bound:g}x", ratio, ratio <= bound))
    return verdicts


def last_figures(cells: list[Cell]) -> dict[str, Any]:
    def rounded(found: dict[int, float]) -> dict[int, float]:
        return {number: round(seconds * 1e3, 3) for number, seconds in found.items()}

    return {
        "tower_ms": rounded(by_candidates(cells, "tower")),
        "candidates_ratio": round(candidates_ratio(cells, "tower"), 3),
        "din_ms": rounded(by_candidates(cells, "din")),
        "heads_ms": rounded(by_candidates(cells, "heads")),
        "state_ms": {candidates: rounded(by_events(cells, candidates)) for candidates in state_lists(cells)},
        "state_ratio": round(state_ratio(cells), 3),
    }


def write(record: Record, cells: list[Cell], verdicts: list[Verdict]) -> None:
    targets = [asdict(verdict) for verdict in verdicts]
    found = [asdict(cell) for cell in cells]
    write_json(record.paths["json"], {**record.context, "targets": targets, **last_figures(cells), "cells": found})
    write_text(record.paths["md"], _markdown(cells, record.context, verdicts))


def _markdown(cells: list[Cell], context: dict, verdicts: list[Verdict]) -> str:
    machine, model, memory, suite = (context[name] for name in ("machine", "model", "memory", "ranking"))
    slots = f"{memory['num_keys'] ** 2:,} slots" if memory["enabled"] else "off"
    tower, din, heads = (by_candidates(cells, name) for name in ("tower", "din", "heads"))
    lists = state_lists(cells)
    lines = [
        "# Ranking: many candidates of a user, and a user with a long past",
        "",
        f"`{context['command']}`, {context['started']}, {context['seconds']:.0f} s in all.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {context['threads']} threads, "
        f"torch {machine['torch']}, load average {machine['load_average']} before and {context['load_average_after']} "
        f"after. Width {model['width']}, heads {model['heads']}, layers {model['layers']}, K = {model['experts']}, "
        f"chunk {model['chunk']}, memory {slots}, float32, one user. Allocator: {context['allocator']}. Medians of "
        f"{suite['repetitions']} rounds in which all cells take turns.",
        "",
        f"A history of {suite['events']:,} events, encoded and read by the candidates of one impression (tower); DIN "
        "over the same events; cross network and MLP, which come behind either.",
        "",
        "| candidates | tower | DIN | cross network and MLP |",
        "|--:|--:|--:|--:|",
        *(
            f"| {number:,} | {tower[number] * 1e3:.2f} ms | {din[number] * 1e3:.2f} ms | {heads[number] * 1e3:.2f} ms |"
            for number in tower
        ),
        "",
        f"Longest list over shortest: tower {candidates_ratio(cells, 'tower'):.2f}, DIN "
        f"{candidates_ratio(cells, 'din'):.1f}.",
        "",
        "A user whose state is there, without a new event: interests out of the state, target attention, cross network "
        "and MLP.",
        "",
        "| past events | " + " | ".join(f"{number:,} candidates" for number in lists) + " |",
        "|--:" * (1 + len(lists)) + "|",
        *(
            f"| {events:,} | "
            + " | ".join(f"{by_events(cells, number)[events] * 1e3:.2f} ms" for number in lists)
            + " |"
            for events in suite["state_events"]
        ),
        "",
        f"Slowest over fastest: {state_ratio(cells):.2f}.",
        "",
        *target_table(verdicts),
    ]
    return "\n".join(lines) + "\n"
