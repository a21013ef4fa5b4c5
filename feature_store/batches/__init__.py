"""Histories and impressions to tensors: splits, examples, windows, batches."""
