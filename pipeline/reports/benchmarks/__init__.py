"""Benchmark suites: what is measured, in which process, and the report."""
