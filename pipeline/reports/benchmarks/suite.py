"""What all suites share: a suite measures and yields reports, `run` writes them to files and judges them.

class Suite:  measure(config, device, log) -> Report, Report, ...     (the last one is whole)
                          |
run(suite) -> OUT/SUITE.json   circumstances, targets, figures, samples
              OUT/SUITE.md     circumstances, the report's lines, targets
              OUT/SUITE.png    the report's plot, if it has one
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from elastic_rec.feature_store.utils.atomic_write import write_json, write_text
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig
from elastic_rec.pipeline.reports.benchmarks.figures import Verdict, markdown_table
from elastic_rec.pipeline.reports.plots import save
from elastic_rec.pipeline.runtime.allocator import keep_freed_memory
from elastic_rec.pipeline.runtime.errors import ConfigError

Log = Callable[[str], None]


@dataclass(frozen=True)
class Report:
    """What a suite has measured so far.

    figures: for the last line of the run and the JSON. samples: for the JSON only. lines: the figures in Markdown.
    circumstances: what the suite knows better than the process that runs it, e.g. the threads of a worker.
    """

    figures: dict[str, Any]
    samples: dict[str, Any]
    verdicts: list[Verdict]
    lines: list[str]
    circumstances: dict[str, Any] = field(default_factory=dict)
    plot: Callable[[], Figure] | None = None


@dataclass(frozen=True)
class Suite:
    """title: of the Markdown. measure(config, device, log): yields a report after each step.

    cpu_only: what it measures, where CUDA has nothing of the kind. tower: its model.tower, whatever the configuration
    says. has_model: false where model and memory play no part.
    """

    title: str
    measure: Callable[[BenchmarkConfig, str, Log], Iterator[Report]]
    cpu_only: str = ""
    tower: str = ""
    has_model: bool = True


def run(suite: Suite, config: BenchmarkConfig, *, device: str, log: Log) -> tuple[dict[str, Any], list[str]]:
    """Measures and writes the files. Returns (what the run prints last, one text per missed target).

    Raises ConfigError where the suite measures a CPU and the device is another.
    """
    name, out, start = config.suite.value, Path(config.out), time.perf_counter()
    if suite.cpu_only and device != "cpu":
        raise ConfigError(f"suite={name} measures {suite.cpu_only}: set device=cpu")
    if suite.tower:
        config.model = replace(config.model, tower=suite.tower)
    out.mkdir(parents=True, exist_ok=True)
    files = {kind: out / f"{name}.{kind}" for kind in ("json", "md")}
    context = _circumstances(suite, config)
    for report in suite.measure(config, device, log):  # each is written: a killed run leaves what it had
        context |= report.circumstances | {
            "seconds": round(time.perf_counter() - start, 1),
            "load_average_after": describe_machine()["load_average"],
        }
        targets = [asdict(verdict) for verdict in report.verdicts]
        write_json(files["json"], {**context, "targets": targets, **report.figures, **report.samples})
        write_text(files["md"], _markdown(suite.title, context, report))
    if report.plot:
        files["png"] = out / f"{name}.png"
        save(report.plot(), files["png"])
    missed = [f"{v.name}: {v.text}, target {v.bound}" for v in report.verdicts if not v.met]
    paths = {kind: str(path) for kind, path in files.items()}
    line = {"suite": name, "seconds": context["seconds"], **paths, **report.figures}
    return {**line, "targets": len(report.verdicts), "missed": missed}, missed


def _circumstances(suite: Suite, config: BenchmarkConfig) -> dict[str, Any]:
    """All that a figure depends on; also sets threads and allocator of this process."""
    if config.threads:
        torch.set_num_threads(config.threads)
    return {
        "command": "python pipeline/benchmark.py " + " ".join(sys.argv[1:]),
        "started": datetime.now().isoformat(timespec="minutes", sep=" "),
        "machine": describe_machine(),
        "threads": torch.get_num_threads(),
        "allocator": keep_freed_memory(),
        **({"model": asdict(config.model), "memory": asdict(config.memory)} if suite.has_model else {}),
        config.suite.value: asdict(getattr(config, config.suite.value)),
        "seed": config.seed,
    }


def _markdown(title: str, context: dict[str, Any], report: Report) -> str:
    machine, shape = context["machine"], ""
    if "model" in context:
        model, memory = context["model"], context["memory"]
        slots = f"{memory['num_keys'] ** 2:,} slots" if memory["enabled"] else "off"
        shape = (
            f" Width {model['width']}, heads {model['heads']}, layers {model['layers']}, feed-forward "
            f"x{model['ffn_multiple']}, K = {model['experts']}, chunk {model['chunk']}, memory {slots}, float32."
        )
    lines = [
        f"# {title}",
        "",
        f"`{context['command']}`, {context['started']}, {context['seconds']:.0f} s in all.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; device "
        f"{context.get('device', 'cpu')}, threads {context['threads']}, torch {machine['torch']}, load average "
        f"{machine['load_average']} before and {context['load_average_after']} after.{shape} Allocator: "
        f"{context['allocator']}.",
        "",
        *report.lines,
    ]
    if report.verdicts:
        rows = [(v.name, v.bound, v.text, "met" if v.met else "**missed**") for v in report.verdicts]
        lines += ["", "## Targets", "", *markdown_table(("target", "bound", "measured", ""), rows, left=4)]
    return "\n".join(lines) + "\n"


def describe_machine() -> dict[str, Any]:
    """load_average: processes running or waiting over the last minute; more than about 1 here says it was shared."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
