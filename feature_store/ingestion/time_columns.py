"""Columns of times: the SQL that reads one as int64 counts since 1970, and what is wrong with a value that it refuses.

    kind      column                                       read as
    int64     integers                                     counts of timestamp_unit
    float     doubles, decimals                            counts, where whole and finite
    float32   floats of 4 bytes                            the same; see file_clock.py
    text      CSV, TSV, Parquet strings                    counts, or ISO dates and times
    date      Parquet dates                                instants
    time      Parquet timestamps, INT96 too                instants
    time_ns   Parquet timestamps of nanoseconds            instants

A value with a zone is an instant, a value without one is UTC. The connection's zone must be UTC (engines/session.py),
whatever the machine's is. Numbers are int64 to the end: no value passes through a double.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.utils.errors import DataError

MOMENTS = ("date", "time", "time_ns")
# No named zones: an hour of autumn has two meanings in them. Digits of a second beyond what is read must be zeros.
_ISO = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.%s)?)?( UTC|Z|[+-](0\d|1[0-5])(:?[0-5]\d)?)?)?"
_ISO_US, _ISO_NS, _ISO_ANY = (_ISO % digits for digits in (r"\d{1,6}0*", r"\d{1,9}0*", r"\d+"))
_LARGEST_MS = (2**63 - 1) // 1000  # DuckDB counts microseconds


def time_sql(value: str, kind: str, unit: str) -> str:
    """SQL of a time as BIGINT in `unit`; NULL where it is null, no time, negative, fractional or too big."""
    if kind == "int64":
        return f"CASE WHEN {value} >= 0 THEN TRY_CAST({value} AS BIGINT) END"
    if kind == "time_ns":
        return _in_unit(f"epoch_ns({value})", 10**9, unit)
    if kind == "time":
        return _in_unit(f"epoch_us({value})", 10**6, unit)
    if kind == "date":  # it may lie beyond all timestamps
        return _in_unit(f"epoch_us(TRY_CAST({value} AS TIMESTAMP))", 10**6, unit)
    number = f"TRY_CAST({value} AS DOUBLE)"  # NaN counts as greater than all else, hence isfinite
    is_number = f"isfinite({number}) AND {number} >= 0 AND {number} = floor({number})"
    iso = f" WHEN {_iso_condition(value, unit)} THEN {_iso_sql(value, unit)}" if kind == "text" else ""
    return f"CASE WHEN {is_number} THEN TRY_CAST({value} AS BIGINT){iso} END"


def time_text_sql(value: str, kind: str) -> str:
    """SQL of a value as messages quote it."""
    if kind == "time_ns":  # DuckDB 1.4 has no text of the first ones
        return f"coalesce(TRY(CAST({value} AS VARCHAR)), CAST(epoch_ns({value}) AS VARCHAR))"
    return f"CAST({value} AS VARCHAR)" if kind in MOMENTS else value


def time_fault(value: object, kind: str, unit: str) -> str:
    """Why time_sql gives NULL for a value that is not null; value: as time_text_sql gives it."""
    if kind in MOMENTS or (kind == "text" and re.fullmatch(_ISO_ANY, str(value))):
        return _moment_fault(str(value), unit)
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return (
            f"is not a number, and no ISO time such as 2024-01-31T12:00:00Z; convert dates to one of them (numbers in "
            f"timestamp_unit={unit})"
        )
    if not np.isfinite(number):
        return "is not a finite number; drop or repair such rows"
    if number < 0:
        return "is negative; timestamps count from 1970, drop or repair such rows"
    if number != int(number):
        return f"is fractional in timestamp_unit={unit}; multiply by 1000 and set timestamp_unit={_finer(unit)}"
    return "does not fit int64; check timestamp_unit"


def stored_time_kind(path: str, local: Path, name: str) -> str:
    """ "date", "time" or "time_ns", of a Parquet column of dates or timestamps; path: as messages name the file.

    DataError names the first row with milliseconds that DuckDB cannot hold, for which it has no row itself.
    """
    with pq.ParquetFile(local) as file:
        type = file.schema_arrow.field(name).type
        if not pa.types.is_timestamp(type):
            return "date"
        leaves = [file.schema.column(number) for number in range(len(file.schema))]
        number = next(number for number, leaf in enumerate(leaves) if leaf.path == name)
        if type.unit == "ms":
            _check_milliseconds(path, file, name, number)
        # INT96 is read with microseconds, but holds more years.
        return "time_ns" if type.unit == "ns" and leaves[number].physical_type != "INT96" else "time"


def _in_unit(ticks: str, per_second: int, unit: str) -> str:
    """SQL of counts of 1/per_second seconds as whole, non-negative counts of `unit`."""
    wanted = UNITS_PER_SECOND[unit]
    if wanted > per_second:
        return f"CASE WHEN {ticks} >= 0 THEN {times_factor(ticks, wanted // per_second)} END"
    factor = per_second // wanted
    return f"CASE WHEN {ticks} >= 0 AND {ticks} % {factor} = 0 THEN {ticks} // {factor} END"


def times_factor(count: str, factor: int) -> str:
    """SQL of count * factor; NULL where it does not fit int64."""
    return f"TRY_CAST(CAST({count} AS HUGEINT) * {factor} AS BIGINT)"


def _iso_condition(value: str, unit: str) -> str:
    return f"regexp_full_match({value}, '{_ISO_NS if unit == 'ns' else _ISO_US}')"


def _iso_sql(value: str, unit: str) -> str:
    # Not AS TIMESTAMP, which drops the zone since DuckDB 2.
    time_us = f"epoch_us(TRY_CAST({value} AS TIMESTAMPTZ))"
    if unit != "ns":
        return _in_unit(time_us, 10**6, unit)
    rest_ns = rf"CAST(rpad(regexp_extract({value}, '\.\d{{6}}(\d{{1,3}})', 1), 3, '0') AS INTEGER)"
    return f"CASE WHEN {time_us} >= 0 THEN TRY_CAST(CAST({time_us} AS HUGEINT) * 1000 + {rest_ns} AS BIGINT) END"


def _moment_fault(text: str, unit: str) -> str:
    if "infinity" in text:
        return "is not a finite time; drop or repair such rows"
    if _is_before_1970(text):
        return "is before 1970; drop or repair such rows"
    year = int(text.split("-")[0])
    if year <= 9999 and not _exists(text):
        return "is a date or hour that does not exist; drop or repair such rows"
    if year >= (2262 if unit == "ns" else 290_000):
        return f"does not fit int64 in timestamp_unit={unit}; drop or repair such rows"
    return f"is no whole number of {unit}; set timestamp_unit={_finer(unit)} or finer"


def _is_before_1970(text: str) -> bool:
    try:
        moment = datetime.fromisoformat(text.replace(" UTC", "+00:00"))
    except ValueError:
        return "(BC)" in text or text.startswith("-")
    return moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp() < 0  # noqa: UP017


def _exists(text: str) -> bool:
    try:
        datetime.fromisoformat(text[:19])
    except ValueError:
        return False
    return True


def _finer(unit: str) -> str:
    return {"s": "ms", "ms": "us", "us": "ns", "ns": "ns"}[unit]


def _check_milliseconds(path: str, file: pq.ParquetFile, name: str, number: int) -> None:
    row = 0
    for group in range(file.num_row_groups):
        about = file.metadata.row_group(group)
        bounds = about.column(number).statistics
        known = bounds is not None and bounds.has_min_max
        if not known or max(abs(bounds.min_raw), abs(bounds.max_raw)) > _LARGEST_MS:
            times = file.read_row_group(group, columns=[name])[name].combine_chunks().cast(pa.int64())
            count = times.fill_null(0).to_numpy()
            far = np.flatnonzero((count > _LARGEST_MS) | (count < -_LARGEST_MS))
            if len(far):
                raise DataError(
                    f"{path}: row {row + far[0] + 1}: timestamp {times[far[0]].as_py()} (ms since 1970) is after the "
                    f"year 290,000, and {len(far) - 1} more such rows follow; the column's type is wrong, cast it again"
                )
        row += about.num_rows
