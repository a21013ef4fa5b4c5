"""The configuration of evaluate.py."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_rec.configs.options import Options, option
from elastic_rec.pipeline.config.data import Seen, check_local
from elastic_rec.pipeline.config.parallel import ParallelConfig

MOST_K = 100_000  # the longest list of items


@dataclass
class EvaluateConfig(Options):
    """Which run is measured, and on what. Raises ValueError outside the bounds."""

    run: str = option("", "run folder of a trained model")
    checkpoint: str = option("best", "best, last, or a step number")
    store: str = option(
        "",
        "another history store. It may have newer ids, but the run's ids must have the same numbers in it; empty: "
        "the run's own",
    )
    version: int | None = option(None, "version of the store; none: the run's, of another store the newest")
    seen: Seen | None = option(None, "task=next_item: keep, exclude or auto, as data.seen; none: the run's policy")
    stage: str = option("test", "test or valid targets", choices=("test", "valid"))
    k: list[int] = option(
        [5, 10, 20],
        "list lengths of HR and NDCG, 10 among them; coverage is always that of 10",
        at_least=1,
        at_most=MOST_K,
    )
    length_edges: list[int] = option(
        [20, 50, 100, 200], "edges of the history-length buckets metrics are also reported by"
    )
    batch_size: int = option(256, "users per batch, over all ranks", at_least=1)
    max_history: int = option(
        0,
        "task=ranking: newest events an impression sees, each encoded by itself; 0: as trained, with histories shared",
        at_least=0,
    )
    min_item_count: int = option(
        0, "also report a catalogue of only the items that occur at least so often; 0: do not", at_least=0
    )
    parallel: ParallelConfig = option(ParallelConfig, "ranks and devices")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(run=self.run)
        if 10 not in self.k:
            raise ValueError(f"k={self.k}: must contain 10, the length models are compared by")
