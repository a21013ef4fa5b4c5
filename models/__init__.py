"""Ops, towers and models: tensors in, tensors out. Knows nothing of files, stores or training loops.

    from elastic_rec.models import CausalTower, MemoryConfig, TowerConfig

A name below is imported when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from elastic_rec.configs.stack import check_stack

if TYPE_CHECKING:
    from elastic_rec.models.ranking.model import RankingModel
    from elastic_rec.models.retrieval.model import RetrievalModel
    from elastic_rec.models.towers.base import build_tower
    from elastic_rec.models.towers.config import MemoryConfig, TowerConfig
    from elastic_rec.models.towers.elastic.causal_tower import CausalTower
    from elastic_rec.models.towers.elastic.tower import ElasticTower
    from elastic_rec.models.towers.sasrec import Sasrec

__all__ = [
    "CausalTower",
    "ElasticTower",
    "MemoryConfig",
    "RankingModel",
    "RetrievalModel",
    "Sasrec",
    "TowerConfig",
    "build_tower",
]

_MODULES = {
    "CausalTower": "towers.elastic.causal_tower",
    "ElasticTower": "towers.elastic.tower",
    "MemoryConfig": "towers.config",
    "RankingModel": "ranking.model",
    "RetrievalModel": "retrieval.model",
    "Sasrec": "towers.sasrec",
    "TowerConfig": "towers.config",
    "build_tower": "towers.base",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"elastic_rec.models has no {name!r}: it has {', '.join(__all__)}")
    return getattr(import_module(f"elastic_rec.models.{_MODULES[name]}"), name)


check_stack()
