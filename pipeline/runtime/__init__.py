"""Processes and devices: starting a verb, ranks, signals, endings, sharding."""
