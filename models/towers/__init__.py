"""Sequence towers: events of users in, interests and summaries out."""
