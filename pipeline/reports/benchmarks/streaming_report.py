"""What the streaming suite measured, what follows from it, and its files for people (Markdown) and programs (JSON)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from elastic_rec.feature_store.utils.atomic_write import write_json, write_text
from elastic_rec.pipeline.reports.benchmarks.config import StreamingTargets
from elastic_rec.pipeline.reports.benchmarks.record import Record, Verdict, target_table


@dataclass
class Fold:
    """samples_s: seconds per new event. state_bytes: of the user's state in storage."""

    events: int
    state_bytes: int
    samples_s: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return median(self.samples_s)


@dataclass
class Pass:
    """peak_rss_bytes: of the whole process, interpreter, libraries and the events themselves included."""

    events: int
    peak_rss_bytes: int
    samples_s: list[float]

    @property
    def seconds(self) -> float:
        return median(self.samples_s)


def fold_ratio(folds: list[Fold]) -> float:
    return max(fold.seconds for fold in folds) / min(fold.seconds for fold in folds)


def slope(passes: list[Pass]) -> float | None:
    """Least squares of log time against log N; needs two lengths."""
    if len(passes) < 2:
        return None
    x, y = (np.log([getattr(row, name) for row in passes]) for name in ("events", "seconds"))
    return float(np.polyfit(x, y, 1)[0])


def judge(folds: list[Fold], passes: list[Pass], targets: StreamingTargets) -> list[Verdict]:
    verdicts = []
    if targets.fold_ratio:
        ratio = fold_ratio(folds)
        name = f"a new event after {folds[0].events:,} to {folds[-1].events:,}, slowest over fastest"
        verdicts.append(Verdict(name, f"at most {targets.fold_ratio:g}x", ratio, ratio <= targets.fold_ratio))
    sizes = {fold.state_bytes for fold in folds}
    verdicts.append(Verdict("different sizes of a state in bytes", "1", len(sizes), len(sizes) == 1))
    if targets.pass_gib and passes:
        gib = passes[-1].peak_rss_bytes / 2**30
        name = f"resident memory of a pass over {passes[-1].events:,} events, GiB"
        verdicts.append(Verdict(name, f"at most {targets.pass_gib:g}", gib, gib <= targets.pass_gib))
    if targets.slope_max:
        found, bound = slope(passes), f"{targets.slope_min:g} to {targets.slope_max:g}"
        met = found is not None and targets.slope_min <= found <= targets.slope_max
        verdicts.append(Verdict("log-log slope of a pass's time", bound, found, met))
    return verdicts


def last_figures(folds: list[Fold], passes: list[Pass]) -> dict[str, Any]:
    return {
        "fold_ms": {fold.events: round(fold.seconds * 1e3, 3) for fold in folds},
        "fold_ratio": fold_ratio(folds),
        "state_bytes": sorted({fold.state_bytes for fold in folds}),
        "pass_s": {row.events: round(row.seconds, 4) for row in passes},
        "pass_peak_rss_gib": {row.events: round(row.peak_rss_bytes / 2**30, 2) for row in passes},
        "pass_slope": slope(passes),
    }


def write(record: Record, folds: list[Fold], passes: list[Pass], verdicts: list[Verdict]) -> None:
    found = {"folds": [asdict(fold) for fold in folds], "passes": [asdict(row) for row in passes]}
    targets = [asdict(verdict) for verdict in verdicts]
    write_json(record.paths["json"], {**record.context, "targets": targets, **last_figures(folds, passes), **found})
    write_text(record.paths["md"], _markdown(folds, passes, record.context, verdicts))


def _markdown(folds: list[Fold], passes: list[Pass], context: dict, verdicts: list[Verdict]) -> str:
    machine, model, memory, suite = (context[name] for name in ("machine", "model", "memory", "streaming"))
    slots = f"{memory['num_keys'] ** 2:,} slots" if memory["enabled"] else "off"
    lines = [
        "# Streaming: a new event for a user with a long past",
        "",
        f"`{context['command']}`, {context['started']}, {context['seconds']:.0f} s in all.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {context['threads']} threads, "
        f"torch {machine['torch']}, load average {machine['load_average']} before and {context['load_average_after']} "
        f"after. Width {model['width']}, heads {model['heads']}, layers {model['layers']}, K = {model['experts']}, "
        f"chunk {model['chunk']}, memory {slots}, float32, one user. Allocator: {context['allocator']}.",
        "",
        f"A fold: a new event into the state, then the user against {suite['catalogue']:,} items and its best ten. "
        f"Median of {suite['repetitions']} rounds in which lengths take turns, {model['chunk']} folds per sample.",
        "",
        "| past events | fold and rescore | bytes of the state |",
        "|--:|--:|--:|",
        *(f"| {fold.events:,} | {fold.seconds * 1e3:.2f} ms | {fold.state_bytes:,} |" for fold in folds),
        "",
        f"Slowest over fastest: {fold_ratio(folds):.2f}.",
        "",
        f"A pass: the whole history into a state, in a process of its own; median of {suite['pass_repetitions']}.",
        "",
        "| events | time | per event | resident memory of the process, at most |",
        "|--:|--:|--:|--:|",
        *(
            f"| {row.events:,} | {row.seconds:.3g} s | {row.seconds / row.events * 1e6:.2f} µs | "
            f"{row.peak_rss_bytes / 2**30:.2f} GiB |"
            for row in passes
        ),
        "",
        *target_table(verdicts),
    ]
    return "\n".join(lines) + "\n"
