"""Errors a user can act on; the message says what happened, where, and what to do."""


class ConfigError(Exception):
    """A setting that cannot work, or does not fit the run or the store it is used with."""


class CheckpointError(Exception):
    """A checkpoint that is missing, half-written, or was made by another model."""


class NonFiniteError(Exception):
    """A loss, weight, query, score or logit is NaN or infinite."""
