"""Stores that grow by days: events of eleven days, appends, restores and vacuums."""

from __future__ import annotations

import copy

import numpy as np
from feature_store_reference import random_events

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig
from elastic_rec.feature_store.table.manifest import content_hash
from elastic_rec.feature_store.table.versions import restore, vacuum


def add(store, path, **settings) -> dict:
    return append(AppendConfig(input=[str(path)], store=str(store.path), threads=1, **settings))


def clean(store, retention_hours=0.0) -> dict:
    return vacuum(str(store.path), retention_hours=retention_hours)


def back(store, version) -> dict:
    return restore(str(store.path), version=version)


def eleven_days(*, strings: bool, days: int = 11) -> list[list[dict]]:
    """Days of unequal size; a tenth of the events come one to three days late; users and items appear over time."""
    rng = np.random.default_rng(3)
    events = sorted(random_events(2200, seed=1, strings=strings, num_users=70, times=330), key=lambda e: e["timestamp"])
    at = np.array([e["timestamp"] for e in events]) - 1_000_000
    day = at * days // 330 + np.where(rng.random(len(at)) < 0.1, rng.integers(1, 4, len(at)), 0)
    day = np.where(rng.random(len(at)) < 0.3, day, np.minimum(day + (day == 4), days - 1))  # a thin day 4
    parts = [[e for e, d in zip(events, np.minimum(day, days - 1), strict=True) if d == n] for n in range(days)]
    for number, part in enumerate(parts):
        for e in part[:: 9 + number]:
            e["item"] = f"new {number}" if strings else 1000 - number
            e["user"] = f"late {number % 4}" if strings else 500 + number
        parts[number] = [part[i] for i in rng.permutation(len(part))]
    return parts


def change(content: dict, place: str, value) -> dict:
    """A copy of `content` with another value at a dotted place, and the hash that goes with it."""
    changed = copy.deepcopy(content)
    *folders, key = place.split(".")
    inside = changed
    for name in folders:
        inside = inside[int(name) if isinstance(inside, list) else name]
    inside[int(key) if isinstance(inside, list) else key] = value
    changed["hash"] = content_hash(changed)
    return changed
