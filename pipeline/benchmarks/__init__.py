"""What `benchmark.py` measures: one module per suite, and the process that the measuring happens in."""
