"""What a user chooses about suite=feature_store."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StoreTargets:
    reader_ratio: float = field(
        default=0.0,
        metadata={"help": "users per second of the reader over those of a bare loop; 0: off"},
    )
    ingest_ratio: float = field(
        default=0.0, metadata={"help": "events per second of an ingest over those of DuckDB's sorted COPY; 0: off"}
    )
    amplification: float = field(
        default=0.0, metadata={"help": "bytes that all ranks decode in an epoch over bytes they use; 0: off"}
    )


@dataclass
class StoreBenchmarkConfig:
    num_users: int = field(default=100, metadata={"help": "users of the log that is drawn (raw_events.py)"})
    num_events: int = field(default=1000, metadata={"help": "its events"})
    num_items: int = field(default=100, metadata={"help": "its items"})
    memory_limit: str = field(default="1GB", metadata={"help": "memory of DuckDB, in the ingest and in the COPY"})
    batch_size: int = field(default=256, metadata={"help": "users in a batch, here and of ParquetFile.iter_batches"})
    workers: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "threads that decode ahead"})
    repetitions: int = field(default=7, metadata={"help": "rounds in which all take turns; figures are medians"})
    ingest_repetitions: int = field(default=3, metadata={"help": "rounds of ingest and COPY"})
    readers: int = field(default=8, metadata={"help": "ranks over which the read amplification is counted"})
    targets: StoreTargets = field(default_factory=StoreTargets, metadata={"help": "what check=true asks for"})

    def __post_init__(self) -> None:
        counts = ("num_users", "num_events", "num_items", "batch_size", "readers")
        for name in (*counts, "repetitions", "ingest_repetitions"):
            if getattr(self, name) < 1:
                raise ValueError(f"feature_store.{name}={getattr(self, name)}: must be at least 1")
        if not self.workers or min(self.workers) < 1:
            raise ValueError(f"feature_store.workers={self.workers}: give one or more positive numbers of threads")
