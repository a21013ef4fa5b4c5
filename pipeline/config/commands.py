"""Every command: `elastic-rec NAME key=value ...`, and `python pipeline/FILE.py [NAME] key=value ...`.

A command whose name is not that of its module is a sub-command: the module's main() takes its name as first argument.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple


class Command(NamedTuple):
    """module: what has its main(). config: the dataclass of its keys, as MODULE:CLASS; both below elastic_rec.pipeline.
    The YAML beside it is configs/NAME.yaml. help: one line for `elastic-rec --help`."""

    module: str
    config: str
    help: str

    @property
    def config_class(self) -> type:
        """Imports the module of the class; those of training need torch."""
        module, name = self.config.split(":")
        return getattr(importlib.import_module(f"elastic_rec.pipeline.{module}"), name)


COMMANDS = {
    "ingest": Command("ingest", "config.data:IngestVerbConfig", "raw events -> history store"),
    "append": Command("ingest", "config.data:AppendConfig", "a day's events -> the next version of a store"),
    "vacuum": Command("ingest", "config.data:VacuumConfig", "delete the files of old versions"),
    "restore": Command("ingest", "config.data:RestoreConfig", "make an old version the current one"),
    "impressions": Command("ingest", "config.data:IngestVerbConfig", "labelled impressions beside the histories"),
    "describe": Command("describe", "config.describe:DescribeConfig", "what is in a store, as a page and as figures"),
    "train": Command("train", "config.train:TrainConfig", "history store -> trained model"),
    "evaluate": Command(
        "evaluate", "config.evaluate:EvaluateConfig", "trained model -> metrics, beside counting baselines"
    ),
    "score": Command("score", "config.score:FullScoreConfig", "trained model -> top-k items of every user, in Parquet"),
    "score incremental": Command(
        "score", "config.score:IncrementalScoreConfig", "the same, from states and new events"
    ),
    "score ranking": Command("score", "config.score:RankingScoreConfig", "a score for each candidate of given lists"),
    "demo": Command("demo", "config.demo:DemoConfig", "the whole pipeline on MovieLens-100K"),
    "verify": Command(
        "verify", "config.verify:VerifyConfig", "read every byte of a store, run or scores, and compare digests"
    ),
    "benchmark": Command(
        "benchmark", "reports.benchmarks.config:BenchmarkConfig", "speed and memory beside other models"
    ),
}
