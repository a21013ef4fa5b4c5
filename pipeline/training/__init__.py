"""The training loop, optimizers, checkpoints, validation, and the run folder."""
