"""What the efficiency suite measured, and what follows: ratios, slopes, targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elastic_rec.pipeline.reports.benchmarks.config import EfficiencyTargets
from elastic_rec.pipeline.reports.benchmarks.contestants import CONTESTANTS, ELASTIC, GATHER, SASREC
from elastic_rec.pipeline.reports.benchmarks.record import Verdict


@dataclass
class Cell:
    """One contestant at one length in one mode. seconds: median of samples_s, None unless status is "ok"."""

    contestant: str
    mode: str
    events: int
    status: str = "ok"
    seconds: float | None = None
    peak_bytes: int = 0
    samples_s: list[float] = field(default_factory=list)
    calls_per_sample: int = 1


class Table:
    """All cells of a run and what follows from them."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str, int], Cell] = {}

    def add(self, cell: Cell) -> None:
        self.cells[cell.contestant, cell.mode, cell.events] = cell

    def seconds(self, contestant: str, mode: str, events: int) -> float | None:
        cell = self.cells.get((contestant, mode, events))
        return cell.seconds if cell else None

    def lengths(self, mode: str) -> list[int]:
        return sorted({cell.events for cell in self.cells.values() if cell.mode == mode})

    def contestants(self, mode: str) -> list[str]:
        found = {cell.contestant for cell in self.cells.values() if cell.mode == mode}
        return [name for name in CONTESTANTS if name in found]

    def curve(self, contestant: str, mode: str) -> list[Cell]:
        """Measured cells by length."""
        cells = [self.cells.get((contestant, mode, events)) for events in self.lengths(mode)]
        return [cell for cell in cells if cell and cell.seconds is not None]

    def ratio(self, over: str, under: str, mode: str, events: int) -> float | None:
        """Time of one over time of the other, where both were measured."""
        a, b = self.seconds(over, mode, events), self.seconds(under, mode, events)
        return a / b if a and b else None

    def slope(self, contestant: str, mode: str, start: int) -> float | None:
        """Least squares of log time against log N over lengths from `start` on; needs two of them."""
        cells = [cell for cell in self.curve(contestant, mode) if cell.events >= start]
        if len(cells) < 2:
            return None
        x, y = (np.log([getattr(cell, name) for cell in cells]) for name in ("events", "seconds"))
        return float(np.polyfit(x, y, 1)[0])


def judge(table: Table, targets: EfficiencyTargets) -> list[Verdict]:
    """Every target for every ELASTIC form that took part. All are about inference."""
    mode, verdicts = "inference", []

    def add(name: str, bound: str, value: float | None, met: Callable[[float], bool]) -> None:
        verdicts.append(Verdict(name, bound, value, value is not None and met(value)))

    for form in (name for name in ELASTIC if name in table.contestants(mode)):
        label, peer = CONTESTANTS[form], CONTESTANTS[SASREC]
        for events, least in zip(targets.speedup_events, targets.speedups, strict=True):
            ratio = table.ratio(SASREC, form, mode, events)
            name = f"{label} speed-up over {peer} at N={events:,}"
            add(name, f"at least {least:g}x", ratio, lambda value, least=least: value >= least)
        if targets.no_slower_from:
            ratios = [table.ratio(SASREC, form, mode, n) for n in table.lengths(mode) if n >= targets.no_slower_from]
            worst = min((ratio for ratio in ratios if ratio is not None), default=None)
            name = f"{label} least speed-up over {peer} from N={targets.no_slower_from:,} on"
            add(name, "at least 1x", worst, lambda value: value >= 1)
        if targets.slope_max:
            slope = table.slope(form, mode, targets.slope_from)
            low, high = targets.slope_min, targets.slope_max
            name = f"{label} log-log slope from N={targets.slope_from:,} on"
            add(name, f"{low:g} to {high:g}", slope, lambda value, low=low, high=high: low <= value <= high)
        if targets.gather_ratio:
            ratios = [table.ratio(form, GATHER, mode, n) for n in table.lengths(mode) if n >= targets.gather_from]
            worst = max((ratio for ratio in ratios if ratio is not None), default=None)
            name = f"{label} time over bare gather from N={targets.gather_from:,} on, worst"
            add(name, f"at most {targets.gather_ratio:g}x", worst, lambda value: value <= targets.gather_ratio)
    return verdicts


def figures(table: Table, targets: EfficiencyTargets) -> dict[str, Any]:
    """What follows from the cells: ratios of each ELASTIC form to the others by length, and slopes."""
    ratios: dict[str, Any] = {}
    slopes: dict[str, Any] = {}
    for mode in ("inference", "training"):
        names = table.contestants(mode)
        slopes[mode] = {name: table.slope(name, mode, targets.slope_from) for name in names}
        for form in (name for name in ELASTIC if name in names):
            for other in (name for name in names if name not in ELASTIC):
                pair = (form, GATHER) if other == GATHER else (other, form)
                by_length = {n: table.ratio(*pair, mode, n) for n in table.lengths(mode)}
                key = f"{form} over gather" if other == GATHER else f"{other} over {form}"
                ratios.setdefault(mode, {})[key] = {n: value for n, value in by_length.items() if value is not None}
    return {"ratios": ratios, "slopes": {mode: found for mode, found in slopes.items() if found}}


def short(cell: Cell) -> str:
    """12.3 ms · 4.1 MiB"""
    if cell.seconds is None:
        return cell.status
    s = cell.seconds
    time_text = f"{s * 1e6:.3g} µs" if s < 1e-3 else f"{s * 1e3:.3g} ms" if s < 1 else f"{s:.3g} s"
    mib = cell.peak_bytes / 2**20
    return f"{time_text} · " + (
        f"{mib:.2g} MiB" if mib < 10 else f"{mib:,.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"
    )
