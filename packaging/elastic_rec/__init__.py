"""The public API of elastic-rec: what a program outside of this repository imports.

    import elastic_rec

    run = elastic_rec.load("runs/demo/run")                          # a trained run (pipeline/runs.py)
    store = elastic_rec.Store.open("runs/demo/store")                # a history store
    tower = elastic_rec.CausalTower(elastic_rec.TowerConfig(tower="elastic_causal"), elastic_rec.MemoryConfig())

The rooms stand at the top level of the repository (pyproject.toml maps elastic_rec.models to models/, and so on). A
name is imported when it is first asked for (PEP 562): `import elastic_rec` loads neither torch nor PyArrow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_rec.feature_store.reading.history_reader import HistoryReader
    from elastic_rec.feature_store.reading.impression_reader import ImpressionReader
    from elastic_rec.feature_store.reading.lookup import HistoryLookup
    from elastic_rec.feature_store.table.store import Store
    from elastic_rec.models.ranking.config import RankingConfig
    from elastic_rec.models.ranking.model import RankingModel
    from elastic_rec.models.retrieval.model import RetrievalModel
    from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
    from elastic_rec.models.towers.elastic.causal_tower import CausalTower
    from elastic_rec.models.towers.elastic.tower import ElasticTower
    from elastic_rec.models.towers.sasrec import Sasrec
    from elastic_rec.pipeline.config.train import TrainConfig
    from elastic_rec.pipeline.runs import Run, UserStates, load

_HOMES = {
    "HistoryReader": "feature_store.reading.history_reader",
    "ImpressionReader": "feature_store.reading.impression_reader",
    "HistoryLookup": "feature_store.reading.lookup",
    "Store": "feature_store.table.store",
    "RankingConfig": "models.ranking.config",
    "RankingModel": "models.ranking.model",
    "RetrievalModel": "models.retrieval.model",
    "CausalTower": "models.towers.elastic.causal_tower",
    "MemoryConfig": "models.towers.config",
    "TowerConfig": "models.towers.config",
    "ElasticTower": "models.towers.elastic.tower",
    "Sasrec": "models.towers.sasrec",
    "TrainConfig": "pipeline.config.train",
    "Run": "pipeline.runs",
    "UserStates": "pipeline.runs",
    "load": "pipeline.runs",
}

__all__ = [
    "CausalTower",
    "ElasticTower",
    "HistoryLookup",
    "HistoryReader",
    "ImpressionReader",
    "MemoryConfig",
    "RankingConfig",
    "RankingModel",
    "RetrievalModel",
    "Run",
    "Sasrec",
    "Store",
    "TowerConfig",
    "TrainConfig",
    "UserStates",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("elastic-rec")
    if name in _HOMES:
        return getattr(importlib.import_module(f"elastic_rec.{_HOMES[name]}"), name)
    raise AttributeError(f"elastic_rec has no {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
