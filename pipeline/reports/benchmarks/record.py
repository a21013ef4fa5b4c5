"""What every suite records beside its own figures: circumstances, targets, and the last line of a run."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from elastic_rec.pipeline.reports.benchmarks.machine import describe_machine


@dataclass(frozen=True)
class Verdict:
    """One target. value: what was measured, None if it was not (which is not met, either)."""

    name: str
    bound: str
    value: float | None
    met: bool

    @property
    def text(self) -> str:
        return "not measured" if self.value is None else f"{self.value:.3g}"


class Record:
    """Begun before anything is measured. context: all that a figure depends on; paths: OUT/SUITE.KIND by kind."""

    def __init__(self, suite: str, out: Path, kinds: tuple[str, ...], **circumstances: Any) -> None:
        self._suite, self._start = suite, time.perf_counter()
        self.paths = {kind: out / f"{suite}.{kind}" for kind in kinds}
        self.context = {
            "command": "python pipeline/benchmark.py " + " ".join(sys.argv[1:]),
            "started": datetime.now().isoformat(timespec="minutes", sep=" "),
            "machine": describe_machine(),
            **circumstances,
        }

    def stop(self) -> None:
        """Notes the seconds until now, and the load; may be called again."""
        self.context["seconds"] = round(time.perf_counter() - self._start, 1)
        self.context["load_average_after"] = describe_machine()["load_average"]

    def last_line(self, figures: dict[str, Any], verdicts: list[Verdict]) -> tuple[dict[str, Any], list[str]]:
        """(what the run prints, one text per missed target)."""
        missed = [f"{verdict.name}: {verdict.text}, target {verdict.bound}" for verdict in verdicts if not verdict.met]
        line = {
            "suite": self._suite,
            "seconds": self.context["seconds"],
            **{kind: str(path) for kind, path in self.paths.items()},
            **figures,
            "targets": len(verdicts),
            "missed": missed,
        }
        return line, missed


def target_table(verdicts: list[Verdict]) -> list[str]:
    """Lines of Markdown."""
    lines = ["| target | bound | measured | |", "|---|---|---|---|"]
    for verdict in verdicts:
        mark = "met" if verdict.met else "**missed**"
        lines.append(f"| {verdict.name} | {verdict.bound} | {verdict.text} | {mark} |")
    return lines
