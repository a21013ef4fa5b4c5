"""From raw events to jagged batches: ingest, the history store, reader and splits. Knows nothing of models."""
