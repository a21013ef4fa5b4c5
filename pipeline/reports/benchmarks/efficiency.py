"""suite=efficiency: time and memory of a user's representation, from N events, against full attention.

One run holds all models. Within a row (mode, N) they take turns; a figure is the median of its rounds. One user per
call. A measurement without figures says why: out of memory, skipped (predicted to take too long), crashed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig, EfficiencyConfig
from elastic_rec.pipeline.reports.benchmarks.efficiency_table import Measurement, Table, report
from elastic_rec.pipeline.reports.benchmarks.figures import in_turns
from elastic_rec.pipeline.reports.benchmarks.models import MODELS, Setup, has_mode
from elastic_rec.pipeline.reports.benchmarks.suite import Log, Report
from elastic_rec.pipeline.reports.benchmarks.worker import OUT_OF_MEMORY, Task, Worker


def measure(config: BenchmarkConfig, device: str, log: Log) -> Iterator[Report]:
    """A report after every row, each with all rows so far."""
    suite = config.efficiency
    setup = Setup(config.model, config.memory, gather_rows=suite.gather_rows, device=device, seed=config.seed)
    worker = Worker(setup, threads=config.threads, memory_limit_gib=suite.memory_limit_gib)
    try:
        circumstances = worker.describe()
        for table in measure_rows(suite, worker, log):
            yield report(table, suite, circumstances)
    finally:
        worker.close()


def measure_rows(config: EfficiencyConfig, worker: Worker, log: Log) -> Iterator[Table]:
    """The one table after every row, shortest histories first."""
    table = Table()
    for mode in config.modes:
        for events in config.events:
            start = time.perf_counter()
            row = _row(config, worker, table, mode, events)
            for found in row:
                table.add(found)
            figures = "  ".join(f"{found.model} {found.text}" for found in row)
            log(f"{mode} N={events:,}: {figures}  ({time.perf_counter() - start:.0f} s)")
            yield table


def _row(config: EfficiencyConfig, worker: Worker, table: Table, mode: str, events: int) -> list[Measurement]:
    names = [name for name in MODELS if name in config.models and has_mode(name, mode)]
    row, rounds = [Measurement(name, mode, events) for name in names], {}
    timeout_s = 60 + 5 * config.max_call_s  # a prediction may be wrong, but not by that much
    for found in row:
        found.status = _foreseen(config, table, found)
        if found.status != "ok":
            continue
        reply = worker.ask(Task(found.model, mode, events, 0), timeout_s=timeout_s)
        found.status, found.peak_bytes = reply.status, reply.peak_bytes
        if reply.status == "ok":
            found.calls_per_sample = math.ceil(config.min_sample_s / reply.seconds)
            sample_s = reply.seconds * found.calls_per_sample
            rounds[found.model] = min(config.repetitions, max(1, int(config.rounds_s / sample_s)))
    for turn, found in in_turns(row, config.repetitions):
        if found.status != "ok" or turn >= rounds[found.model]:
            continue
        reply = worker.ask(Task(found.model, mode, events, found.calls_per_sample), timeout_s=timeout_s)
        found.status = reply.status
        if reply.status == "ok":
            found.samples_s.append(reply.seconds)
    for found in row:
        found.close()
    return row


def _foreseen(config: EfficiencyConfig, table: Table, due: Measurement) -> str:
    """ "ok", or why it is not tried: too little memory at a smaller N, or too slow by the curve so far."""
    before = [found for found in table.row(due.model, due.mode) if found.events < due.events]
    failed = [found for found in before if found.status != "ok"]
    if failed and failed[0].status.startswith(OUT_OF_MEMORY):
        return f"{OUT_OF_MEMORY} (already at N={failed[0].events:,})"
    curve = [found for found in before if found.seconds is not None]
    if len(curve) < 2:  # of one length nothing follows
        return failed[-1].status if failed else "ok"
    limit_gib, limit_s = config.memory_limit_gib, config.max_call_s
    gib = _extrapolate(curve, "peak_bytes", due.events) / 2**30
    if gib > limit_gib:
        return f"{OUT_OF_MEMORY} ({gib:,.0f} GiB predicted, limit {limit_gib:g} GiB)"
    seconds = _extrapolate(curve, "seconds", due.events)
    return "ok" if seconds <= limit_s else f"skipped: {seconds:,.0f} s predicted, limit {limit_s:g} s"


def _extrapolate(curve: list[Measurement], quantity: str, events: int) -> float:
    """Along the power law of the last two lengths, at least linear and at most quadratic."""
    last_two = [max(getattr(found, quantity), 1e-9) for found in curve[-2:]]
    exponent = math.log(last_two[1] / last_two[0]) / math.log(curve[-1].events / curve[-2].events)
    return last_two[1] * (events / curve[-1].events) ** min(2.0, max(1.0, exponent))
