"""The sequence towers that `model.tower` names. A new one is a file with a `SequenceTower`, a line here, and a test."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elastic_rec.models.towers.base import SequenceTower

# Imported when asked for: a configuration is read without torch.
TOWERS = {
    "elastic_causal": "elastic.causal_tower:CausalTower",
    "elastic": "elastic.tower:ElasticTower",
    "sasrec": "sasrec:Sasrec",
}


def tower_class(name: str) -> type[SequenceTower]:
    """The class of a tower in TOWERS."""
    module, _, found = TOWERS[name].partition(":")
    return getattr(import_module(f"elastic_rec.models.towers.{module}"), found)
