"""Whether all times of one file look wrong together: another unit, YYYYMMDD, or rounded to float32.

One time alone says little. All of them do: read in milliseconds, a log in seconds ends in January 1970; a float32 holds
seconds since 1970 in steps of 64 or 128, so the low bits of every time are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from elastic_rec.feature_store.ingestion.time_columns import MOMENTS
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.times import iso_time, likely_unit, written_date

_APRIL_1970_S = 90 * 86_400  # seconds of the year 2200, read as milliseconds, are before it
_FIRST_COARSE_S = 1 << 29  # 1987; from here on float32 holds every 64th second at most
_COARSE_BITS = 6
_WHOLE = 1 << 24  # float32 holds each whole number up to it
_HALF_DAY_S = 43_200  # a multiple of 64, so days and half days look rounded without being so
_IS_DATE = (
    "timestamp BETWEEN 19700101 AND 21991231 AND timestamp // 100 % 100 BETWEEN 1 AND 12 "
    "AND timestamp % 100 BETWEEN 1 AND 31"
)
_MIN_EVENTS = 10  # by chance all of so many times are multiples of 64 in 1 of 2^60 files


class FileClock(NamedTuple):
    """Of a file's times up to `latest`, in `unit`: their number, the newest, the OR of their bits (None: no times)."""

    count: int
    newest: int | None
    bits: int | None


def clock_sql(latest: int) -> str:
    """SQL aggregates over the column `timestamp`, in the order of FileClock; cheap, as every file is asked."""
    known = f"FILTER (timestamp <= {latest})"
    return f"count(*) {known}, max(timestamp) {known}, bit_or(timestamp) {known}"


def clock_fault(clock: FileClock, unit: str, kind: str, count_where: Callable[[str], int]) -> str | None:
    """What is wrong with all times of a file, and what to do; None: nothing.

    kind: of the column (time_columns.py). count_where: how many of the times fulfil an SQL condition.
    """
    if not clock.count:
        return None
    newest, per_second = clock.newest, UNITS_PER_SECOND[unit]
    at = f"the newest, {newest}, is {iso_time(newest // per_second)} in {unit}"
    if newest < _APRIL_1970_S * per_second and (reading := likely_unit(newest, unit=unit)) is not None:
        remedy = f"make the column again from numbers in {reading.unit}"  # as pandas.to_datetime(unit=...) does
        remedy = remedy if kind in MOMENTS else f"set timestamp_unit={reading.unit}"
        return f"{at}. In {reading.unit} it is {reading.iso}: {remedy}"
    date = written_date(newest) if 19700101 <= newest <= 21991231 else None
    if date is not None and count_where(_IS_DATE) == clock.count:
        return f"{at}. All look like dates written as YYYYMMDD: write them as ISO dates ({date.iso})"
    if _has_zero_bits(clock, unit, kind):
        phase = f"timestamp % {_HALF_DAY_S * per_second}"
        if kind == "float32" or count_where(f"{phase} <> {newest % (_HALF_DAY_S * per_second)}"):
            return (
                f"{at}. All are numbers that a float32 holds, which knows times to 64 or 128 s: write the column as "
                "int64 or double, from a source that has every second"
            )
    return None


def _has_zero_bits(clock: FileClock, unit: str, kind: str) -> bool:
    if kind == "float32":
        return clock.newest > _WHOLE
    bits = (clock.bits & -clock.bits).bit_length() - 1  # low bits that are zero in every time
    bits -= {"s": 0, "ms": 3, "us": 6, "ns": 9}[unit]  # whole seconds have so many
    is_recent = clock.newest >= _FIRST_COARSE_S * UNITS_PER_SECOND[unit]
    return is_recent and clock.count >= _MIN_EVENTS and bits >= _COARSE_BITS
