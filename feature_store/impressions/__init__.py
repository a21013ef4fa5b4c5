"""Labelled impressions beside a history store: what a user was shown, when, and what came of it; for ranking."""
