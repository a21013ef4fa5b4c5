"""Raw events -> history store; then its daily appends.

python pipeline/ingest.py data=ml100k
python pipeline/ingest.py data=files "data.ingest.input=[/logs/*.parquet]" data.store=stores/mine
python pipeline/ingest.py data=files "data.ingest.input=[/logs/today.parquet]" data.store=stores/mine \
    data.ingest.mode=append
python pipeline/ingest.py data=files data.store=stores/mine data.ingest.mode=compact
python pipeline/ingest.py data=files data.store=stores/mine data.ingest.mode=rollback data.ingest.generation=6
"""

from elastic_rec.feature_store.append import append
from elastic_rec.feature_store.datasets import prepare
from elastic_rec.feature_store.generations import compact, rollback
from elastic_rec.feature_store.ingest import IngestMode, ingest
from elastic_rec.pipeline.launch import verb
from elastic_rec.pipeline.schema import IngestVerbConfig

MODES = {
    IngestMode.create: ingest,
    IngestMode.append: append,
    IngestMode.compact: compact,
    IngestMode.rollback: rollback,
}


@verb("ingest", IngestVerbConfig)
def main(config: IngestVerbConfig) -> dict:
    data = config.data
    if data.dataset.kind.name != "files" and data.ingest.mode is IngestMode.create:
        data.ingest.input = [str(prepare(data.dataset).events)]
    return MODES[data.ingest.mode](data.ingest)


if __name__ == "__main__":
    main()
