"""The Spark engine: sorts on a cluster, writes the same store as DuckDB."""
