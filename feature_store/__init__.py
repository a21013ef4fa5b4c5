"""From raw events to jagged batches: ingest, the history store, reader and splits. Knows nothing of models.

    from elastic_rec.feature_store import HistoryReader, IngestConfig, Store, ingest
    ingest(IngestConfig(input=["events.parquet"], out="stores/mine"))
    reader = HistoryReader(Store.open("stores/mine"), columns=["item"], global_batch_size=64)

Names are imported when they are asked for (PEP 562), so that an ingest loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_rec.feature_store.ingestion.append import append
    from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
    from elastic_rec.feature_store.ingestion.create import ingest
    from elastic_rec.feature_store.reading.history_reader import HistoryReader
    from elastic_rec.feature_store.reading.impression_reader import ImpressionReader
    from elastic_rec.feature_store.reading.lookup import HistoryLookup
    from elastic_rec.feature_store.table.store import Store

_MODULES = {
    "AppendConfig": "ingestion.config",
    "HistoryLookup": "reading.lookup",
    "HistoryReader": "reading.history_reader",
    "ImpressionReader": "reading.impression_reader",
    "IngestConfig": "ingestion.config",
    "Store": "table.store",
    "append": "ingestion.append",
    "ingest": "ingestion.create",
}

__all__ = [
    "AppendConfig",
    "HistoryLookup",
    "HistoryReader",
    "ImpressionReader",
    "IngestConfig",
    "Store",
    "append",
    "ingest",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
