"""suite=efficiency: time and memory of a user's representation, from N events, against full attention.

One run holds all contestants. Within a row (mode, N) they take turns, in an order that rotates from round to round, so
that whatever else the machine does hits all of them; a cell is the median of its rounds. One user per call.
A cell without figures says why: out of memory, skipped (predicted to take too long), crashed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig, EfficiencyConfig
from elastic_rec.pipeline.reports.benchmarks.contestants import CONTESTANTS, Arena, takes_part
from elastic_rec.pipeline.reports.benchmarks.efficiency_report import write_figures, write_plot, write_table
from elastic_rec.pipeline.reports.benchmarks.efficiency_table import Cell, Table, figures, judge, short
from elastic_rec.pipeline.reports.benchmarks.record import Record, Verdict
from elastic_rec.pipeline.reports.benchmarks.worker import OUT_OF_MEMORY, Task, Worker


def run(config: BenchmarkConfig, *, device: str, out: Path, say: Callable[[str], None]) -> tuple[dict, list[str]]:
    """Measures, writes OUT/efficiency.{json,md,png}; returns (figures for the last line, missed targets)."""
    suite = config.efficiency
    arena = Arena(config.model, config.memory, gather_rows=suite.gather_rows, device=device, seed=config.seed)
    worker = Worker(arena, threads=config.threads, memory_limit_gib=suite.memory_limit_gib)
    record = Record(
        "efficiency",
        out,
        ("json", "md", "png"),
        **worker.describe(),
        model=asdict(config.model),
        memory=asdict(config.memory),
        seed=config.seed,
    )

    def save(table: Table) -> list[Verdict]:
        record.stop()
        verdicts = judge(table, suite.targets)
        for path, write in ((record.paths["json"], write_figures), (record.paths["md"], write_table)):
            write(path, table, config=suite, context=record.context, verdicts=verdicts)
        return verdicts

    try:
        table = measure(suite, worker, say=say, save=save)
    finally:
        worker.close()
    verdicts = save(table)
    write_plot(record.paths["png"], table)
    return record.last_line({"cells": len(table.cells), **figures(table, suite.targets)}, verdicts)


def measure(
    config: EfficiencyConfig, worker: Worker, *, say: Callable[[str], None], save: Callable[[Table], None]
) -> Table:
    """All rows, shortest first; `save` is called after each, so that a killed run leaves what it had."""
    table = Table()
    for mode in config.modes:
        for events in config.events:
            start = time.perf_counter()
            cells = _row(config, worker, table, mode, events)
            for cell in cells:
                table.add(cell)
            save(table)
            figures = "  ".join(f"{cell.contestant} {short(cell)}" for cell in cells)
            say(f"{mode} N={events:,}: {figures}  ({time.perf_counter() - start:.0f} s)")
    return table


def _row(config: EfficiencyConfig, worker: Worker, table: Table, mode: str, events: int) -> list[Cell]:
    cells, rounds = [], {}
    timeout_s = 60 + 5 * config.max_cell_s  # a prediction may be wrong, but not by that much
    for name in CONTESTANTS:
        if name not in config.contestants or not takes_part(name, mode):
            continue
        cell = Cell(name, mode, events)
        cells.append(cell)
        cell.status = _foreseen(config, table, cell)
        if cell.status != "ok":
            continue
        reply = worker.ask(Task(name, mode, events, 0), timeout_s=timeout_s)
        cell.status, cell.peak_bytes = reply.status, reply.peak_bytes
        if reply.status == "ok":
            cell.calls_per_sample = math.ceil(config.min_sample_s / reply.seconds)
            sample_s = reply.seconds * cell.calls_per_sample
            rounds[name] = min(config.repetitions, max(1, int(config.rounds_s / sample_s)))
    for turn in range(config.repetitions):
        shift = turn % len(cells) if cells else 0
        for cell in cells[shift:] + cells[:shift]:
            if cell.status != "ok" or turn >= rounds[cell.contestant]:
                continue
            task = Task(cell.contestant, mode, events, cell.calls_per_sample)
            reply = worker.ask(task, timeout_s=timeout_s)
            cell.status = reply.status
            if reply.status == "ok":
                cell.samples_s.append(reply.seconds)
    for cell in cells:
        if cell.status == "ok":
            cell.seconds = median(cell.samples_s)
        else:
            cell.samples_s, cell.peak_bytes = [], 0
    return cells


def _foreseen(config: EfficiencyConfig, table: Table, cell: Cell) -> str:
    """ "ok", or why there is no use in trying: too little memory at a smaller N, or too slow by the curve so far."""
    shorter = [events for events in table.lengths(cell.mode) if events < cell.events]
    before = [table.cells.get((cell.contestant, cell.mode, events)) for events in shorter]
    failed = [past for past in before if past and past.status != "ok"]
    if failed and failed[0].status.startswith(OUT_OF_MEMORY):
        return f"{OUT_OF_MEMORY} (already at N={failed[0].events:,})"
    curve = [past for past in before if past and past.seconds is not None]
    if len(curve) < 2:  # of one length nothing follows
        return failed[-1].status if failed else "ok"
    limit_gib, limit_s = config.memory_limit_gib, config.max_cell_s
    gib = _extrapolate(curve, "peak_bytes", cell.events) / 2**30
    if gib > limit_gib:
        return f"{OUT_OF_MEMORY} ({gib:,.0f} GiB predicted, limit {limit_gib:g} GiB)"
    seconds = _extrapolate(curve, "seconds", cell.events)
    return "ok" if seconds <= limit_s else f"skipped: {seconds:,.0f} s predicted, limit {limit_s:g} s"


def _extrapolate(curve: list[Cell], quantity: str, events: int) -> float:
    """Along the power law of the last two lengths, at least linear and at most quadratic."""
    last_two = [max(getattr(cell, quantity), 1e-9) for cell in curve[-2:]]
    exponent = math.log(last_two[1] / last_two[0]) / math.log(curve[-1].events / curve[-2].events)
    return last_two[1] * (events / curve[-1].events) ** min(2.0, max(1.0, exponent))
