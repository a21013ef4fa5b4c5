"""Every command: `elastic-rec NAME key=value ...`, and `python pipeline/FILE.py [NAME] key=value ...`.

A command whose name is not that of its module is a sub-command: the module's main() takes its name as first argument.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple


class Command(NamedTuple):
    """module: what has its main(). config: the dataclass of its keys, as MODULE:CLASS; both below elastic_rec.pipeline.
    The YAML beside it is configs/NAME.yaml."""

    module: str
    config: str

    @property
    def config_class(self) -> type:
        """Imports the module of the class; those of training need torch."""
        module, name = self.config.split(":")
        return getattr(importlib.import_module(f"elastic_rec.pipeline.{module}"), name)


COMMANDS = {
    "ingest": Command("ingest", "config.data:IngestVerbConfig"),
    "append": Command("ingest", "config.data:AppendConfig"),
    "vacuum": Command("ingest", "config.data:VacuumConfig"),
    "restore": Command("ingest", "config.data:RestoreConfig"),
    "impressions": Command("ingest", "config.data:IngestVerbConfig"),
    "describe": Command("describe", "config.data:DescribeConfig"),
    "train": Command("train", "config.verbs:TrainConfig"),
    "evaluate": Command("evaluate", "config.verbs:EvaluateConfig"),
    "score": Command("score", "config.verbs:ScoreConfig"),
    "demo": Command("demo", "config.verbs:DemoConfig"),
    "verify": Command("verify", "config.data:VerifyConfig"),
    "benchmark": Command("benchmark", "reports.benchmarks.config:BenchmarkConfig"),
}
