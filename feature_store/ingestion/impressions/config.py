"""What an impression log looks like, and how its times are split."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic_rec.configs.options import Options, option
from elastic_rec.feature_store.ingestion.config import TimeUnit
from elastic_rec.feature_store.table.schema import check_names

STAGES = ("train", "valid", "test")
# Columns of the table itself, and keys that batches add.
RESERVED_NAMES = frozenset({"user_id", "timestamp", "candidates", "item", "bucket", "gap", "candidate", "seq", "rowid"})


@dataclass
class ImpressionConfig(Options, prefix="impressions."):
    """An impression: a user, a time, candidate items, labels for each candidate, and the context they were shown in.

    Raises ValueError for values out of bounds, and for settings that do not go together.
    """

    input: list[str] = option(
        [], "Parquet files, globs or folders of impressions, in order; empty: the store gets none."
    )
    user_column: str = option("user_id", "Input column with the user, as in the events.")
    timestamp_column: str = option("timestamp", "Input column with the impression's time.")
    timestamp_unit: TimeUnit = option(
        TimeUnit.s, "Unit of timestamp_column: s, ms, us or ns; the store's may be another."
    )
    candidates_column: str = option("item_id", "Input column with the candidates: a list of items, or one item.")
    label_columns: list[str] = option(
        [],
        "Input columns with labels from 0 to 1, or true and false: lists as long as the candidates', or one value; "
        "null: no label.",
    )
    label_thresholds: dict[str, float] = option(
        {}, "For labels on another scale, {stars: 4}: 1 where the value is at least 4, else 0."
    )
    context_columns: list[str] = option(
        [], "Categorical columns of the impression or its user: one value (null: unknown) or a list."
    )
    item_input: str | None = option(None, "Parquet file with attributes, one row per item; none: items have none.")
    item_column: str = option("item_id", "Column of item_input with the item.")
    item_context_columns: list[str] = option([], "Categorical columns of item_input: one value or a list (genres).")
    row_group_candidates: int = option(131072, "Candidates in a Parquet row group of the impressions.", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
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
        check_names(names, reserved=RESERVED_NAMES, key="impressions")
        if bool(self.item_input) != bool(self.item_context_columns):
            raise ValueError("impressions: item_input and item_context_columns go together; set both or neither")
