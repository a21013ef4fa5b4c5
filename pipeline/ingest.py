"""Raw events -> history store; then its daily appends, and labelled impressions beside it.

python pipeline/ingest.py data=ml100k
python pipeline/ingest.py data=ml1m_ranking
python pipeline/ingest.py data=files "data.ingest.input=[/logs/*.parquet]" data.store=stores/mine
python pipeline/ingest.py data=files "data.ingest.input=[/logs/today.parquet]" data.store=stores/mine \
    data.ingest.mode=append
python pipeline/ingest.py data=files data.store=stores/mine data.ingest.mode=vacuum
python pipeline/ingest.py data=files data.store=stores/mine data.ingest.mode=restore data.ingest.version=6
python pipeline/ingest.py data=files data.store=stores/mine data.ingest.mode=impressions \
    "data.impressions.input=[/logs/shown.parquet]" "data.impressions.label_columns=[click]"
"""

from elastic_rec.feature_store.datasets import EventFiles, prepare, prepare_impressions
from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.create import IngestMode, ingest
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions
from elastic_rec.feature_store.table.versions import restore, vacuum
from elastic_rec.feature_store.utils.atomic_write import at_place
from elastic_rec.feature_store.utils.scratch import scratch_folder
from elastic_rec.pipeline.config.data import DataConfig, IngestVerbConfig
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import verb

MODES = {
    IngestMode.create: ingest,
    IngestMode.append: append,
    IngestMode.vacuum: lambda config: vacuum(config.out, retention_hours=config.retention_hours),
    IngestMode.restore: lambda config: restore(config.out, version=config.version),
}


@verb("ingest", IngestVerbConfig)
def main(config: IngestVerbConfig) -> dict:
    with at_place(config.data.ingest.out):
        return run(config)


def run(config: IngestVerbConfig) -> dict:
    data, mode, files = config.data, config.data.ingest.mode, None
    if data.dataset.kind.name != "files" and mode in (IngestMode.create, IngestMode.impressions):
        files = prepare(data.dataset)
    if mode is IngestMode.impressions:
        return impressions(data, files)
    if files is not None:
        data.ingest.input = [str(files.events)]
    figures = MODES[mode](data.ingest)
    if mode is IngestMode.create and (data.dataset.impressions or data.impressions.input):
        figures["impressions"] = impressions(data, files)
    return figures


def impressions(data: DataConfig, files: EventFiles | None) -> dict:
    if not data.dataset.impressions and not data.impressions.input:
        raise ConfigError("no impressions: set data.impressions.input, or data.dataset.impressions=true for a data set")
    if data.dataset.impressions and files is None:
        raise ConfigError("data.dataset.impressions=true with kind=files: set data.impressions.input instead")
    settings = {"out": data.ingest.out, "memory_limit": data.ingest.memory_limit, "threads": data.ingest.threads}
    with scratch_folder() as folder:
        made = prepare_impressions(data.dataset, files, folder) if data.dataset.impressions else data.impressions
        return ingest_impressions(made, **settings)


if __name__ == "__main__":
    main()
