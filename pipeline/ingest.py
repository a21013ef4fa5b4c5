"""Raw events -> history store; then its daily appends, and labelled impressions beside it.

python pipeline/ingest.py data=ml100k
python pipeline/ingest.py data=ml1m_ranking
python pipeline/ingest.py data=files "data.ingest.input=[/logs/*.parquet]" data.store=stores/mine
python pipeline/ingest.py append store=stores/mine "input=[/logs/today.parquet]"
python pipeline/ingest.py vacuum store=stores/mine
python pipeline/ingest.py restore store=stores/mine version=6
python pipeline/ingest.py impressions data=files data.store=stores/mine \
    "data.impressions.input=[/logs/shown.parquet]" "data.impressions.label_columns=[click]"
"""

from elastic_rec.feature_store.datasets import EventFiles, prepare, prepare_impressions
from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.config import AppendConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions
from elastic_rec.feature_store.table.versions import restore, vacuum
from elastic_rec.feature_store.utils.scratch import scratch_folder
from elastic_rec.pipeline.config.data import DataConfig, IngestVerbConfig, RestoreConfig, VacuumConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import commands, verb


def create(config: IngestVerbConfig) -> dict:
    """Makes a store of data.ingest.input or of a data set, with its impressions where there are any."""
    data = config.data
    files = _prepared(data)
    if files is not None:
        data.ingest.input = [str(files.events)]
    figures = ingest(data.ingest)
    if data.dataset.impressions or data.impressions.input:
        figures["impressions"] = _impressions(data, files)
    return figures


def impressions(config: IngestVerbConfig) -> dict:
    """Writes the impressions of the store that is at data.store, in the place of those it has."""
    return _impressions(config.data, _prepared(config.data))


def restored(config: RestoreConfig) -> dict:
    """Makes config.version the current one."""
    if config.version is None:
        raise ConfigError("version is not set: say which one to restore, version=6")
    return restore(config.store, version=config.version)


def _prepared(data: DataConfig) -> EventFiles | None:
    return prepare(data.dataset) if data.dataset.kind.name != "files" else None


def _impressions(data: DataConfig, files: EventFiles | None) -> dict:
    if not data.dataset.impressions and not data.impressions.input:
        raise ConfigError("no impressions: set data.impressions.input, or data.dataset.impressions=true for a data set")
    if data.dataset.impressions and files is None:
        raise ConfigError("data.dataset.impressions=true with kind=files: set data.impressions.input instead")
    settings = {"out": data.ingest.out, "memory_limit": data.ingest.memory_limit, "threads": data.ingest.threads}
    with scratch_folder() as folder:
        made = prepare_impressions(data.dataset, files, folder) if data.dataset.impressions else data.impressions
        return ingest_impressions(made, **settings)


main = commands(
    verb("ingest", IngestVerbConfig)(create),
    append=verb("append", AppendConfig)(append),
    vacuum=verb("vacuum", VacuumConfig)(lambda to: vacuum(to.store, retention_hours=to.retention_hours)),
    restore=verb("restore", RestoreConfig)(restored),
    impressions=verb("impressions", IngestVerbConfig)(impressions),
)

if __name__ == "__main__":
    main()
