"""Raw events -> history store.

python pipeline/ingest.py data=ml100k
python pipeline/ingest.py data=files "data.ingest.input=[/logs/*.parquet]" data.store=stores/mine
"""

from elastic_rec.feature_store.datasets import prepare
from elastic_rec.feature_store.ingest import ingest
from elastic_rec.pipeline.launch import verb
from elastic_rec.pipeline.schema import IngestVerbConfig


@verb("ingest", IngestVerbConfig)
def main(config: IngestVerbConfig) -> dict:
    data = config.data
    if data.dataset.kind.name != "files":
        data.ingest.input = [str(prepare(data.dataset).events)]
    return ingest(data.ingest)


if __name__ == "__main__":
    main()
