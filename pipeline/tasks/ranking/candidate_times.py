"""The column `timestamp` of candidates: what it may be, and when a time cannot be meant."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.times import iso_time, sensible_range_s, unit_advice
from elastic_rec.pipeline.runtime.errors import ConfigError

DAY_S = 86_400


def read_times(column: pa.ChunkedArray, *, unit: str, store: Store, where: str, first_row: int) -> np.ndarray:
    """(N,) int64 times in the store's unit, rounded down, as the store's impressions are.

    unit: of numbers; timestamps and dates say it themselves. A zoned timestamp is an instant, others are UTC.
    first_row: row of the file that the column begins with, from 1. ConfigError for a column that is no time, a row
    without one, and a time that cannot belong to the store.
    """
    values, kept = column.combine_chunks(), UNITS_PER_SECOND[store.time_unit]
    if values.null_count:
        row = first_row + int(np.flatnonzero(values.is_null())[0])
        raise ConfigError(
            f"{where}, row {row}: no timestamp, and {values.null_count - 1} more such rows; fill them in, or leave out "
            "the column"
        )
    is_number = not (pa.types.is_timestamp(values.type) or pa.types.is_date(values.type))
    count, given = (_numbers(values, where, first_row), UNITS_PER_SECOND[unit]) if is_number else _ticks(values)
    low_s, high_s = sensible_range_s(*store.time_range_s())
    if high_s is None:
        high_s = (2**63 - 1) // max(kept, given) - 1
    far = np.flatnonzero((count < low_s * given) | (count > high_s * given))
    if len(far):
        odd = int(count[far[0]])
        value, advice = "", "drop or repair such rows"
        if is_number:
            value, advice = f" ({odd} in timestamp_unit={unit})", unit_advice(odd, unit, "timestamp_unit")
        raise ConfigError(
            f"{where}, row {first_row + far[0]}: timestamp {iso_time(odd // given)}{value} cannot belong to the "
            f"events of {store.path}, nor can {len(far) - 1} more in this part; {advice}"
        )
    return count * (kept // given) if kept >= given else count // (given // kept)


def _ticks(values: pa.Array) -> tuple[np.ndarray, int]:
    """(counts since 1970, counts per second) of timestamps and dates."""
    if pa.types.is_date32(values.type):
        return values.cast(pa.int32()).to_numpy().astype(np.int64) * DAY_S, 1
    unit = values.type.unit if pa.types.is_timestamp(values.type) else "ms"
    return values.cast(pa.int64()).to_numpy(), UNITS_PER_SECOND[unit]


def _numbers(values: pa.Array, where: str, first_row: int) -> np.ndarray:
    if not (pa.types.is_integer(values.type) or pa.types.is_float64(values.type)):
        raise ConfigError(
            f"{where}: timestamp is {values.type}: give timestamps, or whole numbers of timestamp_unit as int64 or "
            "double (float32 knows times to 64 or 128 s only)"
        )
    whole = values.cast(pa.int64(), safe=False).to_numpy()
    odd = np.flatnonzero(whole != values.to_numpy())
    if len(odd):
        raise ConfigError(
            f"{where}, row {first_row + odd[0]}: timestamp {values[odd[0]]} is no whole number of timestamp_unit, or "
            "does not fit int64"
        )
    return whole
