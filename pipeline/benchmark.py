"""Speed and memory against peers, with targets.

python pipeline/benchmark.py suite=efficiency device=cpu
python pipeline/benchmark.py suite=efficiency check=true "efficiency.events=[1024,4096,16384]"
python pipeline/benchmark.py suite=streaming device=cpu
python pipeline/benchmark.py suite=far_back
python pipeline/benchmark.py suite=ranking device=cpu
python pipeline/benchmark.py suite=feature_store device=cpu
"""

import os
import sys
from pathlib import Path

import torch

from elastic_rec.feature_store.utils.atomic_write import to_json
from elastic_rec.pipeline.reports.benchmarks import efficiency, far_back, feature_store, ranking, streaming
from elastic_rec.pipeline.reports.benchmarks.config import BenchmarkConfig, Suite
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import verb

# A suite is a function (config, device, out, say) -> (figures of the last line, one text per missed target).
SUITES = {
    Suite.efficiency: efficiency.run,
    Suite.streaming: streaming.run,
    Suite.far_back: far_back.run,
    Suite.ranking: ranking.run,
    Suite.feature_store: feature_store.run,
}


@verb("benchmark", BenchmarkConfig)
def main(config: BenchmarkConfig) -> dict:
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    figures, missed = SUITES[config.suite](config, device=_device(config.device), out=out, say=_say)
    if config.check and missed:
        print(to_json(figures))
        print("missed: " + "; ".join(missed), flush=True)
        os._exit(1)  # at once: nothing may be printed after this line
    return figures


def _device(asked: str) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device here; use device=cpu or auto")
    return "cuda" if asked != "cpu" and torch.cuda.is_available() else "cpu"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
