"""Where a job runs: devices, placement of tables, and how long ranks wait for each other."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_rec.configs.options import Options, option

WEEK_S = 7 * 86400


@dataclass
class ParallelConfig(Options, prefix="parallel."):
    """Of train, evaluate and score. Raises ValueError outside the bounds."""

    device: str = option("auto", "auto (CUDA where there is one), cpu or cuda", choices=("auto", "cpu", "cuda"))
    row_wise_tables: list[str] = option(
        ["item", "bank"], "tables whose rows are spread over all ranks; the planner places the others whole"
    )
    device_memory_gib: float = option(
        8.0, "memory per rank the planner may fill with tables (GPU memory on CUDA), GiB", at_least=0
    )
    host_init_gib: float = option(
        2.0,
        "tables up to this size are initialised whole on every host, so that the start does not depend on the number "
        "of ranks; larger ones are initialised shard by shard",
        at_least=0,
    )
    timeout_s: float = option(
        600.0,
        "seconds that ranks wait for one that does not arrive, before the job ends and names it; more than the slowest "
        "rank needs for a checkpoint",
        at_least=1,
        at_most=WEEK_S,
    )
