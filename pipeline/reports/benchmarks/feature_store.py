"""suite=feature_store: an ingest against DuckDB's own sorted COPY, the reader against Parquet itself.

    log of raw events --ingest--> store    against    the same files --COPY (... ORDER BY bucket, user, time)--> Parquet
    store --HistoryReader--> shuffled batches, KeyedJaggedTensors    against    ParquetFile.iter_batches, same leaves

All sides of a comparison take turns in one run. A round's ratio is of its own figures; the median of rounds is
reported. Every round opens the store again, so that nothing is left in a decoder's cache.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import duckdb
import pyarrow.parquet as pq

from elastic_rec.feature_store.batches.prefix_batch import features_of
from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.engines.session import bucket_sql
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.table.schema import ITEM, TIMESTAMP, leaf_path
from elastic_rec.feature_store.table.store import Store
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig, StoreBenchmarkConfig
from elastic_rec.pipeline.reports.benchmarks.figures import Verdict, at_least, at_most, markdown_table
from elastic_rec.pipeline.reports.benchmarks.raw_events import write_events
from elastic_rec.pipeline.reports.benchmarks.suite import Log, Report

NUM_BUCKETS = 16
LEAVES = [leaf_path(TIMESTAMP), leaf_path(ITEM)]


@dataclass
class Comparison:
    """base_s, ours_s: seconds for `count` of `unit`, one of each per round."""

    name: str
    unit: str
    count: int = 0
    base_s: list[float] = field(default_factory=list)
    ours_s: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Our speed over the other's: the median of rounds, whose sides ran one after the other."""
        return median(base / ours for base, ours in zip(self.base_s, self.ours_s, strict=True))

    @property
    def per_second(self) -> tuple[float, float]:
        """`unit` per second of the other and of ours."""
        return self.count / median(self.base_s), self.count / median(self.ours_s)

    @property
    def text(self) -> str:
        """A line for people."""
        base, ours = self.per_second
        return f"{self.name}: {ours:,.0f} {self.unit}/s against {base:,.0f}, {self.ratio:.2f} of it"


def measure(config: BenchmarkConfig, device: str, log: Log) -> Iterator[Report]:
    """One report, of ingest, readers and read amplification."""
    suite = config.feature_store
    with tempfile.TemporaryDirectory(prefix="feature_store-", dir=config.out) as scratch:
        work = Path(scratch)
        files = write_events(work / "log", suite.num_users, suite.num_events, suite.num_items, config.seed)
        log(f"drew {suite.num_events:,} events")
        comparisons = [compare_ingest(suite, files, work)]
        log(comparisons[0].text)
        store = Store.open(work / "store")
        comparisons += compare_readers(suite, store)
        decoded = read_amplification(suite, store)
    for comparison in comparisons[1:]:
        log(comparison.text)
    log(f"{suite.readers} readers decode {decoded:.3f} times what they use")
    ratios = {comparison.name: round(comparison.ratio, 3) for comparison in comparisons}
    yield Report(
        figures={"ratios": ratios, "read_amplification": round(decoded, 4)},
        samples={"comparisons": [asdict(comparison) for comparison in comparisons]},
        verdicts=judge(comparisons, decoded, suite),
        lines=_lines(suite, comparisons),
    )


def compare_ingest(suite: StoreBenchmarkConfig, files: list[Path], work: Path) -> Comparison:
    """Rounds of both, in turns; the last store stays at work/store."""
    found = Comparison("ingest", "events", suite.num_events)
    for _ in range(suite.ingest_repetitions):
        found.base_s.append(_seconds(sorted_copy, suite, files, work))
        config = IngestConfig(
            input=[str(path) for path in files],
            out=str(work / "store"),
            num_buckets=NUM_BUCKETS,
            memory_limit=suite.memory_limit,
            overwrite=True,
        )
        found.ours_s.append(_seconds(ingest, config))
    return found


def sorted_copy(suite: StoreBenchmarkConfig, files: list[Path], work: Path) -> None:
    """DuckDB alone writes the events in the store's order, one row each; events of equal time in any order."""
    folder = work / "copy"
    folder.mkdir()
    settings = {"memory_limit": suite.memory_limit, "temp_directory": str(folder / "spill")}
    paths = ", ".join(f"'{path}'" for path in files)
    with duckdb.connect(str(folder / "copy.duckdb"), config=settings) as db:
        db.execute(
            f"COPY (SELECT {bucket_sql('user_id', 'int64', NUM_BUCKETS)} AS bucket, user_id, timestamp, item_id "
            f"FROM read_parquet([{paths}]) ORDER BY bucket, user_id, timestamp) "
            f"TO '{folder / 'events.parquet'}' (FORMAT parquet, COMPRESSION zstd)"
        )
    shutil.rmtree(folder)


def compare_readers(suite: StoreBenchmarkConfig, store: Store) -> list[Comparison]:
    """Each number of workers against two loops over ParquetFile.iter_batches.

    The first loop is as pyarrow has it: it decodes columns side by side on all cores. Second, as many loops as there
    are workers, over equal parts of the files, each held to one thread.
    """
    loops, threads = (
        [Comparison(name.format(workers), "users", store.num_users) for workers in suite.workers]
        for name in ("reader, workers={}", "reader, workers={}, over as many single-threaded loops")
    )
    for turn in range(suite.repetitions + 1):
        for workers, over_loop, over_threads in zip(suite.workers, loops, threads, strict=True):
            loop_s = _seconds(iterate, store, suite.batch_size)
            ours_s = _seconds(read, store, suite.batch_size, workers)
            threads_s = _seconds(iterate_in_threads, store, suite.batch_size, workers)
            if turn:  # the first round warms up
                over_loop.base_s.append(loop_s)
                over_threads.base_s.append(threads_s)
                over_loop.ours_s.append(ours_s)
                over_threads.ours_s.append(ours_s)
    return [*loops, *threads]


def read(store: Store, batch_size: int, workers: int) -> int:
    """Reads one shuffled epoch with `workers` threads; returns its events."""
    reader = HistoryReader(store, columns=[ITEM], global_batch_size=batch_size, shuffle=True, workers=workers)
    num_events = 0
    for histories in reader.epoch(0):
        num_events += features_of(histories).values().numel()
    return num_events


def iterate(store: Store, batch_size: int) -> int:
    """Reads all files with pyarrow, one after the other; returns their users."""
    return sum(_iterate(file.path, batch_size, use_threads=True) for file in store.files)


def iterate_in_threads(store: Store, batch_size: int, threads: int) -> int:
    """Reads all files with pyarrow, each thread its part of them; returns their users."""

    def part(first: int) -> int:
        return sum(_iterate(file.path, batch_size, use_threads=False) for file in store.files[first::threads])

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(part, range(threads)))


def _iterate(path: object, batch_size: int, *, use_threads: bool) -> int:
    batches = pq.ParquetFile(str(path)).iter_batches(batch_size, columns=LEAVES, use_threads=use_threads)
    return sum(batch.num_rows for batch in batches)


def read_amplification(suite: StoreBenchmarkConfig, store: Store) -> float:
    """Events that all ranks decode in one epoch over events of the store. All leaves are equally wide, so this is the
    ratio of bytes, too."""
    decoded = 0
    for rank in range(suite.readers):
        reader = HistoryReader(
            store,
            columns=[ITEM],
            global_batch_size=max(suite.batch_size, suite.readers),
            rank=rank,
            world_size=suite.readers,
            shuffle=True,
        )
        for _ in reader.epoch(0):
            pass
        decoded += reader.decoder.num_decoded_events
    return decoded / store.num_events


def _seconds(call: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


def judge(comparisons: list[Comparison], decoded: float, suite: StoreBenchmarkConfig) -> list[Verdict]:
    """comparisons: of the ingest, then of the readers. decoded: the read amplification."""
    targets, (ingest, *readers) = suite.targets, comparisons
    verdicts = at_least("ingest over DuckDB's sorted COPY", targets.ingest_ratio, ingest.ratio)
    for workers, reader in zip(suite.workers, readers, strict=False):
        name = f"reader with {workers} workers over ParquetFile.iter_batches"
        verdicts += at_least(name, targets.reader_ratio, reader.ratio)
    name = f"bytes decoded over bytes used, {suite.readers} readers"
    return [*verdicts, *at_most(name, targets.amplification, decoded)]


def _lines(suite: StoreBenchmarkConfig, comparisons: list[Comparison]) -> list[str]:
    rows = []
    for comparison in comparisons:
        base, ours = (f"{speed:,.0f} {comparison.unit}/s" for speed in comparison.per_second)
        rows.append((comparison.name, ours, base, f"{comparison.ratio:.2f}"))
    return [
        f"{suite.num_events:,} events, at most {suite.num_users:,} users and {suite.num_items:,} items; DuckDB with "
        f"{suite.memory_limit}; batches of {suite.batch_size} users. Medians of rounds ({suite.ingest_repetitions} of "
        f"ingest, {suite.repetitions} of reading).",
        "",
        *markdown_table(("", "ours", "the other", "ratio"), rows, left=1),
    ]
