"""Ranking model: candidate features, readers of the history, heads per label."""
