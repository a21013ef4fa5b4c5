"""Helpers without knowledge of a store: errors, files, locks, hashes, spans of arrays."""
