"""Engines that sort raw events into histories: DuckDB on one machine, Spark on many."""
