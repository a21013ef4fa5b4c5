"""From raw events to jagged batches: ingest, the history store, reader and splits. Knows nothing of models."""

from elastic_rec.configs.stack import check_stack

check_stack()
