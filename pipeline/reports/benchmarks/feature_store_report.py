"""What suite=feature_store measured, what follows from it, and its files for people (Markdown) and programs (JSON)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from elastic_rec.feature_store.utils.atomic_write import write_json, write_text
from elastic_rec.pipeline.reports.benchmarks.record import Record, Verdict, target_table
from elastic_rec.pipeline.reports.benchmarks.store_config import StoreBenchmarkConfig


@dataclass
class Comparison:
    """base_s, ours_s: seconds for `count` of `unit`, one of each per round."""

    name: str
    unit: str
    count: int = 0
    base_s: list[float] = field(default_factory=list)
    ours_s: list[float] = field(default_factory=list)

    def add(self, base_s: float, ours_s: float) -> None:
        self.base_s.append(base_s)
        self.ours_s.append(ours_s)

    @property
    def ratio(self) -> float:
        """Our speed over the other's; the median of rounds, whose sides ran one after the other."""
        return median(base / ours for base, ours in zip(self.base_s, self.ours_s, strict=True))

    @property
    def per_second(self) -> tuple[float, float]:
        return self.count / median(self.base_s), self.count / median(self.ours_s)

    @property
    def text(self) -> str:
        base, ours = self.per_second
        return f"{self.name}: {ours:,.0f} {self.unit}/s against {base:,.0f}, {self.ratio:.2f} of it"


def judge(comparisons: list[Comparison], decoded: float, suite: StoreBenchmarkConfig) -> list[Verdict]:
    targets, verdicts = suite.targets, []
    ingest, *readers = comparisons
    if targets.ingest_ratio:
        verdicts.append(_at_least("ingest over DuckDB's sorted COPY", targets.ingest_ratio, ingest.ratio))
    if targets.reader_ratio:
        for workers, reader in zip(suite.workers, readers, strict=False):
            name = f"reader with {workers} workers over ParquetFile.iter_batches"
            verdicts.append(_at_least(name, targets.reader_ratio, reader.ratio))
    if targets.amplification:
        bound = f"at most {targets.amplification:g}"
        name = f"bytes decoded over bytes used, {suite.readers} readers"
        verdicts.append(Verdict(name, bound, decoded, decoded <= targets.amplification))
    return verdicts


def _at_least(name: str, least: float, found: float) -> Verdict:
    return Verdict(name, f"at least {least:g}", found, found >= least)


def last_figures(comparisons: list[Comparison], decoded: float) -> dict[str, Any]:
    ratios = {comparison.name: round(comparison.ratio, 3) for comparison in comparisons}
    return {"ratios": ratios, "read_amplification": round(decoded, 4)}


def write(record: Record, comparisons: list[Comparison], decoded: float, verdicts: list[Verdict]) -> None:
    found = {"comparisons": [asdict(comparison) for comparison in comparisons]}
    targets = [asdict(verdict) for verdict in verdicts]
    write_json(
        record.paths["json"], {**record.context, "targets": targets, **last_figures(comparisons, decoded), **found}
    )
    write_text(record.paths["md"], _markdown(comparisons, record.context, verdicts))


def _markdown(comparisons: list[Comparison], context: dict, verdicts: list[Verdict]) -> str:
    machine, suite = context["machine"], context["feature_store"]
    lines = [
        "# The feature store against DuckDB and Parquet alone",
        "",
        f"`{context['command']}`, {context['started']}, {context['seconds']:.0f} s in all.",
        "",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, load average "
        f"{machine['load_average']} before and {context['load_average_after']} after. {suite['num_events']:,} events, "
        f"at most {suite['num_users']:,} users and {suite['num_items']:,} items; DuckDB with {suite['memory_limit']}; "
        f"batches of {suite['batch_size']} users. Medians of rounds ({suite['ingest_repetitions']} of ingest, "
        f"{suite['repetitions']} of reading). Allocator: {context['allocator']}.",
        "",
        "| | ours | the other | ratio |",
        "|---|--:|--:|--:|",
    ]
    for comparison in comparisons:
        base, ours = comparison.per_second
        unit = comparison.unit
        lines.append(f"| {comparison.name} | {ours:,.0f} {unit}/s | {base:,.0f} {unit}/s | {comparison.ratio:.2f} |")
    lines += ["", *target_table(verdicts)]
    return "\n".join(lines) + "\n"
