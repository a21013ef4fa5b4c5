"""Ingest on a cluster: Apache Spark in place of DuckDB, the same store value for value."""
