"""The efficiency suite's table for people (Markdown), for programs (JSON) and for the eye (log-log plot)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from elastic_rec.feature_store.utils.atomic_write import write_json, write_text
from elastic_rec.pipeline.reports.benchmarks.config import EfficiencyConfig
from elastic_rec.pipeline.reports.benchmarks.contestants import CONTESTANTS, ELASTIC, GATHER
from elastic_rec.pipeline.reports.benchmarks.efficiency_table import Table, figures, short
from elastic_rec.pipeline.reports.benchmarks.record import Verdict, target_table

LOOKS = {
    "elastic": ("#2a6f97", "o-"),
    "elastic_causal": ("#61a5c2", "s-"),
    "sasrec": ("#bc4749", "o-"),
    "sasrec_newest": ("#e09f3e", "s--"),
    "naive": ("#6d597a", "o:"),
    "gather": ("#8d99ae", "-"),
}


def write_figures(
    path: Path, table: Table, *, config: EfficiencyConfig, context: dict, verdicts: list[Verdict]
) -> None:
    """context: machine, threads, device, shapes: whatever a figure depends on and the table can't know."""
    found = figures(table, config.targets)
    cells = [asdict(cell) for cell in table.cells.values()]
    targets = [asdict(verdict) for verdict in verdicts]
    write_json(path, {**context, "efficiency": asdict(config), "targets": targets, **found, "cells": cells})


def write_table(path: Path, table: Table, *, config: EfficiencyConfig, context: dict, verdicts: list[Verdict]) -> None:
    machine, model, memory = context["machine"], context["model"], context["memory"]
    slots = f"{memory['num_keys'] ** 2:,} slots" if memory["enabled"] else "off"
    lines = [
        "# Efficiency: a user's representation from N events",
        "",
        f"`{context['command']}`, {context['started']}, {context['seconds']:.0f} s in all.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; device {context['device']}, "
        f"threads {context['threads']}, torch {machine['torch']}, load average {machine['load_average']} before and "
        f"{context['load_average_after']} after. Width {model['width']}, heads {model['heads']}, layers "
        f"{model['layers']}, feed-forward x{model['ffn_multiple']}, K = {model['experts']}, memory {slots}, float32, "
        f"one user per call. Allocator: {context['allocator']}.",
        "",
        f"Cells: median time of up to {config.repetitions} rounds in which contestants take turns (fewer where they "
        f"would take over {config.rounds_s:g} s, at least 1), and the peak of torch's allocator above weights and "
        f"events. A call may allocate {config.memory_limit_gib:g} GiB.",
    ]
    for mode in ("inference", "training"):
        if names := table.contestants(mode):
            lines += ["", f"## {mode.capitalize()}", "", *_times(table, mode, names)]
            lines += ["", *_slopes(table, mode, names, config.targets.slope_from), "", *_ratios(table, mode, names)]
    lines += ["", "## Targets", "", *target_table(verdicts)]
    write_text(path, "\n".join(lines) + "\n")


def _times(table: Table, mode: str, names: list[str]) -> list[str]:
    rows = [[short(table.cells[name, mode, events]) for name in names] for events in table.lengths(mode)]
    return _rows([CONTESTANTS[name] for name in names], table.lengths(mode), rows)


def _ratios(table: Table, mode: str, names: list[str]) -> list[str]:
    """How many times as long the others take as an ELASTIC form; against the gather, the other way round."""
    pairs = [(form, other) for form in ELASTIC if form in names for other in names if other not in ELASTIC]
    pairs = [(form, other) if other == GATHER else (other, form) for form, other in pairs]
    rows = []
    for events in table.lengths(mode):
        ratios = [table.ratio(over, under, mode, events) for over, under in pairs]
        rows.append(["" if ratio is None else f"{ratio:.1f}x" for ratio in ratios])
    return _rows([f"{CONTESTANTS[over]} / {CONTESTANTS[under]}" for over, under in pairs], table.lengths(mode), rows)


def _slopes(table: Table, mode: str, names: list[str], start: int) -> list[str]:
    slopes = {name: table.slope(name, mode, start) for name in names}
    known = ", ".join(f"{CONTESTANTS[name]} {slope:.2f}" for name, slope in slopes.items() if slope is not None)
    return [f"Log-log slope of time from N = {start:,} on: {known or 'too few lengths'}."]


def _rows(heads: list[str], lengths: list[int], rows: list[list[str]]) -> list[str]:
    lines = ["| N | " + " | ".join(heads) + " |", "|--:" * (1 + len(heads)) + "|"]
    return lines + [f"| {n:,} | " + " | ".join(row) + " |" for n, row in zip(lengths, rows, strict=True)]


def write_plot(path: Path, table: Table) -> None:
    """Time above, peak memory below, a column per mode; a curve ends where its contestant ran out of memory or time."""
    modes = [mode for mode in ("inference", "training") if table.contestants(mode)]
    figure, axes = plt.subplots(2, len(modes), figsize=(5 * len(modes), 7), layout="constrained", squeeze=False)
    for column, mode in enumerate(modes):
        for name in table.contestants(mode):
            cells, (color, style) = table.curve(name, mode), LOOKS[name]
            x = [cell.events for cell in cells]
            look: dict[str, Any] = {"color": color, "ms": 4, "label": CONTESTANTS[name]}
            axes[0][column].plot(x, [cell.seconds for cell in cells], style, **look)
            axes[1][column].plot(x, [max(cell.peak_bytes, 1) / 2**20 for cell in cells], style, **look)
        axes[0][column].set(title=mode, ylabel="seconds per user")
        axes[1][column].set(xlabel="events N", ylabel="peak memory, MiB")
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
