"""Heads: from a user's interests to scores."""
