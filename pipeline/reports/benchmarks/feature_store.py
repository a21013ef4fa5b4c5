"""suite=feature_store: an ingest against DuckDB's own sorted COPY, the reader against Parquet itself.

    log of raw events --ingest--> store    against    the same files --COPY (... ORDER BY bucket, user, time)--> Parquet
    store --HistoryReader--> shuffled batches, KeyedJaggedTensors    against    ParquetFile.iter_batches, same leaves

All sides of a comparison take turns in one run; a round's ratio is of its own figures, and the median of rounds is
reported. Every round opens the store anew: nothing is left in a decoder's cache.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import torch

from elastic_rec.feature_store.batches.prefix_batch import features_of
from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.table.schema import ITEM, TIMESTAMP, leaf_path
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.sql import bucket_sql
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig
from elastic_rec.pipeline.reports.benchmarks.feature_store_report import Comparison, judge, last_figures, write
from elastic_rec.pipeline.reports.benchmarks.raw_events import write_events
from elastic_rec.pipeline.reports.benchmarks.record import Record
from elastic_rec.pipeline.reports.benchmarks.store_config import StoreBenchmarkConfig
from elastic_rec.pipeline.runtime.allocator import keep_freed_memory
from elastic_rec.pipeline.runtime.errors import ConfigError

NUM_BUCKETS = 16
LEAVES = [leaf_path(TIMESTAMP), leaf_path(ITEM)]


def run(config: BenchmarkConfig, *, device: str, out: Path, say: Callable[[str], None]) -> tuple[dict, list[str]]:
    """Measures, writes OUT/feature_store.{json,md}; returns (figures for the last line, missed targets)."""
    if device != "cpu":
        raise ConfigError("suite=feature_store measures disk and CPU: set device=cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    suite = config.feature_store
    record = Record(
        "feature_store",
        out,
        ("json", "md"),
        allocator=keep_freed_memory(),
        feature_store=asdict(suite),
        seed=config.seed,
    )
    with tempfile.TemporaryDirectory(prefix="feature_store-", dir=out) as scratch:
        work = Path(scratch)
        logs = write_events(work / "log", suite.num_users, suite.num_events, suite.num_items, config.seed)
        say(f"drew {suite.num_events:,} events")
        comparisons = [compare_ingest(suite, logs, work, say)]
        store = Store.open(work / "store")
        comparisons += compare_readers(suite, store, say)
        decoded = read_amplification(suite, store)
    say(f"{suite.readers} readers decode {decoded:.3f} times what they use")
    verdicts = judge(comparisons, decoded, suite)
    record.stop()
    write(record, comparisons, decoded, verdicts)
    return record.last_line(last_figures(comparisons, decoded), verdicts)


def compare_ingest(suite: StoreBenchmarkConfig, logs: list[Path], work: Path, say: Callable) -> Comparison:
    """Rounds of both, in turns; the last store stays at work/store."""
    found = Comparison("ingest", "events")
    for _ in range(suite.ingest_repetitions):
        found.base_s.append(_seconds(sorted_copy, suite, logs, work))
        config = IngestConfig(
            input=[str(path) for path in logs],
            out=str(work / "store"),
            num_buckets=NUM_BUCKETS,
            memory_limit=suite.memory_limit,
            overwrite=True,
        )
        found.ours_s.append(_seconds(ingest, config))
    found.count = suite.num_events
    say(found.text)
    return found


def sorted_copy(suite: StoreBenchmarkConfig, logs: list[Path], work: Path) -> None:
    """The events of the log in the store's order but for ties, one row each, by DuckDB alone."""
    folder = work / "copy"
    folder.mkdir()
    settings = {"memory_limit": suite.memory_limit, "temp_directory": str(folder / "spill")}
    files = ", ".join(f"'{path}'" for path in logs)
    with duckdb.connect(str(folder / "copy.duckdb"), config=settings) as db:
        db.execute(
            f"COPY (SELECT {bucket_sql('user_id', 'int64', NUM_BUCKETS)} AS bucket, user_id, timestamp, item_id "
            f"FROM read_parquet([{files}]) ORDER BY bucket, user_id, timestamp) "
            f"TO '{folder / 'events.parquet'}' (FORMAT parquet, COMPRESSION zstd)"
        )
    shutil.rmtree(folder)


def compare_readers(suite: StoreBenchmarkConfig, store: Store, say: Callable) -> list[Comparison]:
    """Per number of workers: against a loop of ParquetFile.iter_batches as pyarrow has it, which decodes columns side
    by side on all cores; then against as many such loops as there are workers, over equal parts of the files, each held
    to one thread."""
    loops, threads = (
        [Comparison(name.format(workers), "users", store.num_users) for workers in suite.workers]
        for name in ("reader, workers={}", "reader, workers={}, over as many single-threaded loops")
    )
    for turn in range(suite.repetitions + 1):  # the first warms up
        for workers, over_loop, over_threads in zip(suite.workers, loops, threads, strict=True):
            loop_s = _seconds(iterate, store, suite.batch_size)
            ours_s = _seconds(read, store, suite.batch_size, workers)
            threads_s = _seconds(iterate_in_threads, store, suite.batch_size, workers)
            if turn:
                over_loop.add(loop_s, ours_s)
                over_threads.add(threads_s, ours_s)
    for found in [*loops, *threads]:
        say(found.text)
    return [*loops, *threads]


def read(store: Store, batch_size: int, workers: int) -> int:
    reader = HistoryReader(store, columns=[ITEM], global_batch_size=batch_size, shuffle=True, workers=workers)
    num_events = 0
    for histories in reader.epoch(0):
        num_events += features_of(histories).values().numel()
    return num_events


def iterate(store: Store, batch_size: int) -> int:
    return sum(_iterate(file.path, batch_size, use_threads=True) for file in store.files)


def iterate_in_threads(store: Store, batch_size: int, threads: int) -> int:
    def part(first: int) -> int:
        return sum(_iterate(file.path, batch_size, use_threads=False) for file in store.files[first::threads])

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(part, range(threads)))


def _iterate(path: object, batch_size: int, *, use_threads: bool) -> int:
    batches = pq.ParquetFile(str(path)).iter_batches(batch_size, columns=LEAVES, use_threads=use_threads)
    return sum(batch.num_rows for batch in batches)


def read_amplification(suite: StoreBenchmarkConfig, store: Store) -> float:
    """Events that the ranks of one epoch decode over those of the store; leaves are of one width, so bytes, too."""
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
