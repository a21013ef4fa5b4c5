"""What suite=efficiency measured, and what follows from it: ratios, slopes, targets, tables, and a plot."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from elastic_rec.pipeline.reports.benchmarks.config import EfficiencyConfig, EfficiencyTargets
from elastic_rec.pipeline.reports.benchmarks.figures import (
    Verdict,
    at_least,
    at_most,
    between,
    log_log_slope,
    markdown_table,
)
from elastic_rec.pipeline.reports.benchmarks.models import ELASTIC, GATHER, MODELS, MODES, SASREC
from elastic_rec.pipeline.reports.benchmarks.suite import Report
from elastic_rec.pipeline.reports.plots import BLUE, GREY, LIGHT_BLUE, ORANGE, RED, VIOLET, plt

LOOKS = {
    "elastic": (BLUE, "o-"),
    "elastic_causal": (LIGHT_BLUE, "s-"),
    "sasrec": (RED, "o-"),
    "sasrec_newest": (ORANGE, "s--"),
    "naive": (VIOLET, "o:"),
    "gather": (GREY, "-"),
}


@dataclass
class Measurement:
    """One model at one length in one mode. seconds: median of samples_s, None unless status is "ok"."""

    model: str
    mode: str
    events: int
    status: str = "ok"
    seconds: float | None = None
    peak_bytes: int = 0
    samples_s: list[float] = field(default_factory=list)
    calls_per_sample: int = 1

    def close(self) -> None:
        """After the last round: figures where all went well, and none where not."""
        if self.status == "ok":
            self.seconds = median(self.samples_s)
        else:
            self.samples_s, self.peak_bytes = [], 0

    @property
    def text(self) -> str:
        """12.3 ms · 4.1 MiB, or why there is no figure."""
        if (s := self.seconds) is None:
            return self.status
        duration = f"{s * 1e6:.3g} µs" if s < 1e-3 else f"{s * 1e3:.3g} ms" if s < 1 else f"{s:.3g} s"
        mib = self.peak_bytes / 2**20
        size = f"{mib:.2g} MiB" if mib < 10 else f"{mib:,.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"
        return f"{duration} · {size}"


class Table:
    """All measurements of a run."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, int], Measurement] = {}

    def add(self, found: Measurement) -> None:
        """Adds a measurement, or replaces that of the same model, mode and length."""
        self.found[found.model, found.mode, found.events] = found

    def lengths(self, mode: str) -> list[int]:
        """Numbers of events, ascending."""
        return sorted({found.events for found in self.found.values() if found.mode == mode})

    def models(self, mode: str) -> list[str]:
        """Names, in the order of MODELS."""
        measured = {found.model for found in self.found.values() if found.mode == mode}
        return [name for name in MODELS if name in measured]

    def row(self, model: str, mode: str) -> list[Measurement]:
        """Of one model, by length."""
        found = [found for found in self.found.values() if (found.model, found.mode) == (model, mode)]
        return sorted(found, key=lambda found: found.events)

    def curve(self, model: str, mode: str) -> list[Measurement]:
        """Those of a row that have figures."""
        return [found for found in self.row(model, mode) if found.seconds is not None]

    def pairs(self, mode: str) -> list[tuple[str, str]]:
        """(over, under): each other model over each form of ELASTIC; against the gather, the form over it."""
        names = self.models(mode)
        others = [name for name in names if name not in ELASTIC]
        pairs = [(form, other) for form in ELASTIC if form in names for other in others]
        return [(form, other) if other == GATHER else (other, form) for form, other in pairs]

    def ratios(self, over: str, under: str, mode: str) -> dict[int, float]:
        """Length -> time of one over time of the other, where both were measured."""
        below = {found.events: found.seconds for found in self.curve(under, mode)}
        return {f.events: f.seconds / below[f.events] for f in self.curve(over, mode) if f.events in below}

    def slope(self, model: str, mode: str, start: int) -> float | None:
        """Log-log slope of time over lengths from `start` on; None for fewer than two."""
        return log_log_slope((f.events, f.seconds) for f in self.curve(model, mode) if f.events >= start)


def report(table: Table, config: EfficiencyConfig, circumstances: dict[str, Any]) -> Report:
    """circumstances: threads, device and allocator of the worker."""
    found = figures(table, config.targets)
    return Report(
        figures=found,
        samples={"cells": [asdict(found) for found in table.found.values()]},
        verdicts=judge(table, config.targets),
        lines=_lines(table, config),
        circumstances=circumstances,
        plot=lambda: plot(table),
    )


def judge(table: Table, targets: EfficiencyTargets) -> list[Verdict]:
    """Every target that is on, for every form of ELASTIC that was measured. All are about inference."""
    mode, peer, verdicts = "inference", MODELS[SASREC], []

    def from_length(start: int, over: str, under: str) -> list[float]:
        return [ratio for events, ratio in table.ratios(over, under, mode).items() if events >= start]

    for form in (name for name in ELASTIC if name in table.models(mode)):
        label, speedups = MODELS[form], table.ratios(SASREC, form, mode)
        for events, least in zip(targets.speedup_events, targets.speedups, strict=True):
            verdicts += at_least(f"{label} speed-up over {peer} at N={events:,}", least, speedups.get(events), "x")
        start = targets.no_slower_from
        worst = min(from_length(start, SASREC, form), default=None)
        verdicts += at_least(f"{label} least speed-up over {peer} from N={start:,} on", int(start > 0), worst, "x")
        start = targets.slope_from
        name, slope = f"{label} log-log slope from N={start:,} on", table.slope(form, mode, start)
        verdicts += between(name, targets.slope_min, targets.slope_max, slope)
        start = targets.gather_from
        worst = max(from_length(start, form, GATHER), default=None)
        name = f"{label} time over bare gather from N={start:,} on, worst"
        verdicts += at_most(name, targets.gather_ratio, worst, "x")
    return verdicts


def figures(table: Table, targets: EfficiencyTargets) -> dict[str, Any]:
    """Number of measurements; by mode the ratios of each pair by length, and the slope of each model."""
    modes = [mode for mode in MODES if table.models(mode)]
    return {
        "cells": len(table.found),
        "ratios": {
            mode: {f"{over} over {under}": table.ratios(over, under, mode) for over, under in table.pairs(mode)}
            for mode in modes
            if table.pairs(mode)
        },
        "slopes": {
            mode: {name: table.slope(name, mode, targets.slope_from) for name in table.models(mode)} for mode in modes
        },
    }


def _lines(table: Table, config: EfficiencyConfig) -> list[str]:
    lines = [
        f"One user per call. Median time of up to {config.repetitions} rounds in which models take turns (fewer where "
        f"they would take over {config.rounds_s:g} s, at least 1), and the peak of torch's allocator above weights and "
        f"events. A call may allocate {config.memory_limit_gib:g} GiB.",
    ]
    for mode in MODES:
        names, pairs, lengths = table.models(mode), table.pairs(mode), table.lengths(mode)
        if not names:
            continue
        ratios = [table.ratios(over, under, mode) for over, under in pairs]
        start = config.targets.slope_from
        slopes = {name: table.slope(name, mode, start) for name in names}
        known = ", ".join(f"{MODELS[name]} {slope:.2f}" for name, slope in slopes.items() if slope is not None)
        rows = [(f"{n:,}", *(table.found[name, mode, n].text for name in names)) for n in lengths]
        lines += ["", f"## {mode.capitalize()}", "", *markdown_table(("N", *map(MODELS.get, names)), rows), ""]
        lines += [f"Log-log slope of time from N = {start:,} on: {known or 'too few lengths'}.", ""]
        rows = [(f"{n:,}", *(f"{found[n]:.1f}x" if n in found else "" for found in ratios)) for n in lengths]
        lines += markdown_table(("N", *(f"{MODELS[over]} / {MODELS[under]}" for over, under in pairs)), rows)
    return lines


def plot(table: Table) -> Figure:
    """Time above, peak memory below, a column per mode. A curve ends where its model ran out of memory or time."""
    modes = [mode for mode in MODES if table.models(mode)]
    figure, axes = plt.subplots(2, len(modes), figsize=(5 * len(modes), 7), squeeze=False)
    for (above, below), mode in zip(axes.T, modes, strict=True):
        for name in table.models(mode):
            curve, (color, style) = table.curve(name, mode), LOOKS[name]
            x, look = [found.events for found in curve], {"color": color, "ms": 4, "label": MODELS[name]}
            above.plot(x, [found.seconds for found in curve], style, **look)
            below.plot(x, [max(found.peak_bytes, 1) / 2**20 for found in curve], style, **look)
        above.set(title=mode, ylabel="seconds per user", yscale="log")
        below.set(xlabel="events N", ylabel="peak memory, MiB", yscale="log")
        for axis in (above, below):
            axis.set_xscale("log", base=2)
    axes[0][0].legend()
    return figure
