"""The column `timestamp` of candidates: what it may be, and when a time cannot be meant."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from elastic_rec.feature_store.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.store import Store
from elastic_rec.feature_store.times import iso_time, sensible_range_s, unit_advice
from elastic_rec.pipeline.errors import ConfigError

DAY_S = 86_400


def times_s(column: pa.ChunkedArray, *, unit: str, store: Store, where: str, first_row: int) -> np.ndarray:
    """(N,) int64 whole seconds, rounded down. unit: of numbers; timestamps and dates say it themselves.

    A zoned timestamp is an instant, one without a zone is UTC. first_row: row of the file that the column begins with,
    from 1. ConfigError for a column that is no time, a row without one, and a time that cannot belong to the store.
    """
    values = column.combine_chunks()
    if values.null_count:
        row = first_row + int(np.flatnonzero(values.is_null())[0])
        raise ConfigError(
            f"{where}, row {row}: no timestamp, and {values.null_count - 1} more such rows; fill them in, or leave out "
            "the column"
        )
    is_number = not (pa.types.is_timestamp(values.type) or pa.types.is_date(values.type))
    count, per_second = (_numbers(values, where, first_row), UNITS_PER_SECOND[unit]) if is_number else _ticks(values)
    time_s = count // per_second if per_second else count * DAY_S
    low_s, high_s = sensible_range_s(*store.time_range_s())
    far = np.flatnonzero((time_s < low_s) | (time_s > (high_s if high_s is not None else np.iinfo(np.int64).max)))
    if len(far):
        value, advice = "", "drop or repair such rows"
        if is_number:
            value = f" ({count[far[0]]} in timestamp_unit={unit})"
            advice = unit_advice(int(count[far[0]]), unit, "timestamp_unit")
        raise ConfigError(
            f"{where}, row {first_row + far[0]}: timestamp {iso_time(int(time_s[far[0]]))}{value} cannot belong to the "
            f"events of {store.path}, nor can {len(far) - 1} more in this part; {advice}"
        )
    return time_s


def _ticks(values: pa.Array) -> tuple[np.ndarray, int]:
    """(counts, counts per second); 0 per second: days."""
    if pa.types.is_date32(values.type):
        return values.cast(pa.int32()).to_numpy().astype(np.int64), 0
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
