"""The configuration of verify.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_rec.configs.options import Options, option


@dataclass
class VerifyConfig(Options):
    """What is compared with what was written; at least one of them."""

    store: str = option("", "history store to verify, with its impressions and states")
    run: str = option("", "run folder whose checkpoints to verify")
    scores: str = option("", "folder of scores to verify")
