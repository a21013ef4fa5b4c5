"""The configuration of describe.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_rec.configs.options import Options, option


@dataclass
class DescribeConfig(Options):
    """Which store is described, and where to. Raises ValueError for limits that are none."""

    store: str = option("", "history store to describe")
    version: int | None = option(None, "version to describe; none: the current one")
    out: str = option("", "HTML file to write; empty: STORE.html, beside a local store")
    max_history: list[int] = option(
        [50, 200, 1000], "limits on the history for which to say what they would cut", at_least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_history:
            raise ValueError("max_history=[]: give limits of at least 1 event")
        self.max_history = sorted(set(self.max_history))
