"""Data sets that a verb can ask for by name: MovieLens, and synthetic events whose best reachable hit rate is known."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from elastic_rec.configs.options import Options, option
from elastic_rec.feature_store.datasets.fetch import DatasetUnavailable
from elastic_rec.feature_store.datasets.files import EventFiles, default_cache_dir
from elastic_rec.feature_store.datasets.impressions import PlantedConfig, movielens_impressions, planted_impressions
from elastic_rec.feature_store.datasets.movielens import movielens
from elastic_rec.feature_store.datasets.synthetic import SyntheticConfig, generate
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.utils.errors import DataError

__all__ = [
    "DatasetConfig",
    "DatasetKind",
    "DatasetUnavailable",
    "EventFiles",
    "SyntheticConfig",
    "generate",
    "movielens",
    "prepare",
    "prepare_impressions",
]


class DatasetKind(Enum):
    """The data sets that prepare() knows; files: one's own, which are ingested as they are."""

    ml100k = "ml100k"
    ml1m = "ml1m"
    ml20m = "ml20m"
    synthetic = "synthetic"
    files = "files"


@dataclass
class DatasetConfig(Options, prefix="dataset."):
    """Which data set to prepare, and its knobs where it is made here."""

    kind: DatasetKind = option(DatasetKind.ml100k, "which data set: ml100k, ml1m, ml20m, synthetic, or your own files")
    source: str | None = option(None, "MovieLens: a GroupLens zip or its unpacked folder, used instead of fetching it")
    cache_dir: str | None = option(
        None, "where prepared data sets are kept; default $ELASTIC_REC_CACHE or ~/.cache/elastic-rec"
    )
    synthetic: SyntheticConfig = option(SyntheticConfig, "knobs of the synthetic set, used with kind=synthetic")
    impressions: bool = option(False, "also make the set's impressions, for ranking (not with kind=files)")
    planted: PlantedConfig = option(PlantedConfig, "knobs of synthetic impressions, used with kind=synthetic")


def prepare(config: DatasetConfig, out_dir: str | Path | None = None) -> EventFiles:
    """The event files of the data set that `config` names, made or fetched unless they are there already.

    out_dir: where synthetic events go (default: the cache, a folder per setting). MovieLens always lives in the cache.
    Raises DatasetUnavailable when MovieLens cannot be had, DataError for a bad copy or for kind=files.
    """
    if config.kind is DatasetKind.files:
        raise DataError(
            "kind=files names your own event files, which are ingested as they are; there is nothing to prepare"
        )
    if config.kind is not DatasetKind.synthetic:
        return movielens(config.kind.value, source=config.source, cache_dir=config.cache_dir)
    if config.source is not None:
        raise DataError(
            f"source={config.source} means nothing with kind=synthetic; leave source out, or choose a MovieLens set"
        )
    if out_dir is None:
        setting = hashlib.sha256(json.dumps(asdict(config.synthetic), sort_keys=True).encode()).hexdigest()
        cache_dir = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
        out_dir = cache_dir / f"synthetic-{setting[:12]}"
    return generate(config.synthetic, out_dir)


def prepare_impressions(config: DatasetConfig, files: EventFiles, folder: Path) -> ImpressionConfig:
    """Makes the impressions of `files`, which prepare(config) gave, in `folder`; what to ingest them with."""
    if config.kind is DatasetKind.synthetic:
        return planted_impressions(files, config.synthetic, config.planted, folder)
    return movielens_impressions(files, folder)
