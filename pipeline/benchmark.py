"""Speed, memory and long-range accuracy against other models and libraries, with targets.

python pipeline/benchmark.py suite=efficiency device=cpu
python pipeline/benchmark.py suite=efficiency check=true "efficiency.events=[1024,4096,16384]"
python pipeline/benchmark.py suite=streaming device=cpu
python pipeline/benchmark.py suite=far_back
python pipeline/benchmark.py suite=ranking device=cpu
python pipeline/benchmark.py suite=feature_store device=cpu
"""

import os
import sys

import torch

from elastic_rec.feature_store.utils.atomic_write import to_json
from elastic_rec.pipeline.reports.benchmarks import efficiency, far_back, feature_store, ranking, streaming
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig, SuiteName
from elastic_rec.pipeline.reports.benchmarks.suite import Suite, run
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import verb

SUITES = {
    SuiteName.efficiency: Suite("Efficiency: a user's representation from N events", efficiency.measure),
    SuiteName.streaming: Suite(
        "Streaming: a new event for a user with a long past",
        streaming.measure,
        cpu_only="the memory of a process, not of a GPU",
        tower="elastic_causal",
    ),
    SuiteName.far_back: Suite("Far back: the deciding event lies d events back", far_back.measure),
    SuiteName.ranking: Suite(
        "Ranking: many candidates of a user, and a user with a long past",
        ranking.measure,
        cpu_only="with a CPU's clock",
        tower="elastic_causal",
    ),
    SuiteName.feature_store: Suite(
        "The feature store against DuckDB and Parquet alone",
        feature_store.measure,
        cpu_only="disk and CPU",
        has_model=False,
    ),
}


@verb("benchmark", BenchmarkConfig)
def main(config: BenchmarkConfig) -> dict:
    """Runs one suite; with check=true a missed target ends the process with exit code 1."""
    figures, missed = run(SUITES[config.suite], config, device=_device(config.device), log=_log)
    if config.check and missed:
        print(to_json(figures))
        print("missed: " + "; ".join(missed), flush=True)
        os._exit(1)  # at once: this is the last line
    return figures


def _device(asked: str) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device here; use device=cpu or auto")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
