"""What an impression log looks like, and how its times are split."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from elastic_rec.feature_store.ingestion.create import TimeUnit

STAGES = ("train", "valid", "test")
# Columns of the table itself, and keys that batches add.
RESERVED_NAMES = frozenset({"user_id", "timestamp", "candidates", "item", "bucket", "gap", "candidate", "seq", "rowid"})


@dataclass
class ImpressionConfig:
    """An impression: a user, a time, candidate items, labels for each candidate, and the context they were shown in."""

    input: list[str] = field(
        default_factory=list,
        metadata={"help": "Parquet files, globs or folders of impressions, in order; empty: the store gets none."},
    )
    user_column: str = field(default="user_id", metadata={"help": "Input column with the user, as in the events."})
    timestamp_column: str = field(default="timestamp", metadata={"help": "Input column with the impression's time."})
    timestamp_unit: TimeUnit = field(
        default=TimeUnit.s, metadata={"help": "Unit of timestamp_column: s, ms, us or ns; the store's may be another."}
    )
    candidates_column: str = field(
        default="item_id", metadata={"help": "Input column with the candidates: a list of items, or one item."}
    )
    label_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Input columns with labels from 0 to 1, or true and false: lists as long as the candidates', or "
            "one value; null: no label."
        },
    )
    label_thresholds: dict[str, float] = field(
        default_factory=dict,
        metadata={"help": "For labels on another scale, {stars: 4}: 1 where the value is at least 4, else 0."},
    )
    context_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "Categorical columns of the impression or its user: one value (null: unknown) or a list."},
    )
    item_input: str | None = field(
        default=None, metadata={"help": "Parquet file with attributes, one row per item; none: items have none."}
    )
    item_column: str = field(default="item_id", metadata={"help": "Column of item_input with the item."})
    item_context_columns: list[str] = field(
        default_factory=list, metadata={"help": "Categorical columns of item_input: one value or a list (genres)."}
    )
    row_group_candidates: int = field(
        default=131072, metadata={"help": "Candidates in a Parquet row group of the impressions."}
    )

    def __post_init__(self) -> None:
        self.timestamp_unit = TimeUnit(self.timestamp_unit)
        if self.input and not self.label_columns:
            raise ValueError("impressions.label_columns is empty: name the columns that say what came of an impression")
        wrong = [name for name, lowest in self.label_thresholds.items()
                 if name not in self.label_columns or not math.isfinite(lowest)]  # fmt: skip
        if wrong:
            raise ValueError(
                f"impressions.label_thresholds: {wrong[0]!r} is not in label_columns={self.label_columns}, or its "
                "threshold is no finite number"
            )
        names = [*self.label_columns, *self.context_columns, *self.item_context_columns]
        for name in names:
            if name.lower() in RESERVED_NAMES or not name.replace("_", "a").isalnum():
                raise ValueError(f"impressions: '{name}' is reserved or not made of letters, digits and _; rename it")
        if len({name.lower() for name in names}) < len(names):
            raise ValueError(f"impressions: a name is given twice in {names}")
        if bool(self.item_input) != bool(self.item_context_columns):
            raise ValueError("impressions: item_input and item_context_columns go together; set both or neither")
        if self.row_group_candidates < 1:
            raise ValueError(f"impressions.row_group_candidates={self.row_group_candidates}: must be at least 1")
