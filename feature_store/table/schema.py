"""Names and Arrow types of a history store: one row per user, one list<struct> column of events.

    user_id: int64 | string
    num_events: int32
    events:  list<struct<timestamp: int64, [event_id: int64 | string,] item: int64, context columns: int64 ...>>

Parquet shreds the struct, so one leaf (`events.list.element.item`) is read without the others, and columns can
not get unequal lengths. Nothing is nullable: flat values come back without a validity mask.
"""

from __future__ import annotations

import pyarrow as pa

USER = "user_id"
EVENTS = "events"
NUM_EVENTS = "num_events"  # how long the list is: all that batching by events has to read of other ranks' users
TIMESTAMP = "timestamp"
EVENT_ID = "event_id"
ITEM = "item"
# What an event column may not be called: leaves of the store itself, names the engine uses, keys that batches add.
RESERVED_NAMES = frozenset(
    {USER, "user", TIMESTAMP, EVENT_ID, ITEM, EVENTS, "bucket", "rowid", "raw_id", "seq", "gap", "candidate", "slot"}
)
UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

ARROW_TYPES = {"int64": pa.int64(), "string": pa.string()}


def check_names(names: list[str], *, reserved: frozenset[str], key: str) -> None:
    """ValueError where a column of the input cannot be one of the store. key: the config key, for messages."""
    for name in names:
        if name.lower() in reserved or not name.replace("_", "a").isalnum():
            raise ValueError(f"{key}: '{name}' is reserved or not made of letters, digits and _; rename the column")
    if len({name.lower() for name in names}) < len(names):
        raise ValueError(f"{key}: a name is given twice in {names}")


def event_types(*, event_id_type: str | None, context_columns: list[str]) -> dict[str, str]:
    """Leaf of an event -> its type, in the order of the struct. Item and context are indices of vocabularies."""
    event_id = {EVENT_ID: event_id_type} if event_id_type is not None else {}
    return {TIMESTAMP: "int64", **event_id, ITEM: "int64", **dict.fromkeys(context_columns, "int64")}


def history_schema(user_type: str, event_types: dict[str, str]) -> pa.Schema:
    """Arrow schema of the data files; types are keys of ARROW_TYPES."""
    leaves = [pa.field(name, ARROW_TYPES[type], nullable=False) for name, type in event_types.items()]
    events = pa.list_(pa.field("element", pa.struct(leaves), nullable=False))
    return pa.schema(
        [
            pa.field(USER, ARROW_TYPES[user_type], nullable=False),
            pa.field(NUM_EVENTS, pa.int32(), nullable=False),
            pa.field(EVENTS, events, nullable=False),
        ]
    )


def leaf_path(column: str) -> str:
    """Parquet path of one event column: what `columns=[...]` of a Parquet reader takes."""
    return f"{EVENTS}.list.element.{column}"
