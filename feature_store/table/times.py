"""Moments as people write them: dates, epoch seconds, and what a number that is neither may have been meant as."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np

from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND

YEAR_1971_S = 31_536_000
YEAR_2200_S = 7_258_118_400
# Where real logs lie: a number that falls in here when it is read in another unit was most likely written in it.
_LIKELY_S = (631_152_000, 4_102_444_800)  # 1990, 2100
_DATE_FORMS = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
_DATE_NAMES = {4: "YYYY", 6: "YYYYMM", 8: "YYYYMMDD", 12: "YYYYMMDDhhmm", 14: "YYYYMMDDhhmmss"}


class Reading(NamedTuple):
    """What a number may have been meant as: `name` for messages, the moment as ISO text, and the unit if it is one."""

    name: str
    iso: str
    unit: str | None


def parse_time_s(text: str | int | float, *, key: str = "time") -> int:
    """ISO date or time (UTC unless it carries a zone), or epoch seconds -> whole seconds, rounded up: an event at
    t seconds (floored) is before the moment exactly where t < the result.

    key: what messages call it. ValueError for a number that is a date (YYYYMMDD) or in another unit, and for moments
    after the year 2200.
    """
    try:
        time_s = math.ceil(float(text))
    except (ValueError, OverflowError):
        return _parse_iso(str(text), key)
    is_late = time_s > YEAR_2200_S
    reading = written_date(time_s) or (likely_unit(time_s, unit="s") if is_late else None)
    if reading is None and not is_late:
        return time_s
    at = "after the year 2200" if is_late else iso_time(time_s)
    problem = f"{key} '{text}': a number is seconds since 1970, and this one is {at}"
    if reading is None:
        raise ValueError(f"{problem}; give an ISO date such as 2001-01-31, or seconds since 1970")
    also = f", or {time_s // UNITS_PER_SECOND[reading.unit]}" if reading.unit else ""
    also += "" if is_late else f" ({at} if that second is meant)"
    raise ValueError(f"{problem}. It looks like {reading.name}: write {reading.iso}{also}")


def iso_time(time_s: int) -> str:
    """Whole seconds since 1970 as an ISO time in UTC."""
    return str(np.datetime64(time_s, "s")) + "Z"


def written_date(number: int) -> Reading | None:
    """20231118, 202311, 2023 or 20231118120000 read as the date that its digits spell."""
    digits = str(number)
    form = _DATE_FORMS.get(len(digits))
    try:
        moment = datetime.strptime(digits, form) if form else None
    except ValueError:
        return None
    if moment is None or not 1970 <= moment.year < 2200:
        return None
    iso = moment.strftime("%Y-%m-%d" if len(digits) <= 8 else "%Y-%m-%dT%H:%M:%S")
    return Reading(f"a date written as {_DATE_NAMES[len(digits)]}", iso, None)


def likely_unit(number: int, *, unit: str) -> Reading | None:
    """The other unit in which the number falls between 1990 and 2100, if there is one."""
    first, last = _LIKELY_S
    for name, per_second in UNITS_PER_SECOND.items():
        if name != unit and first <= number // per_second < last:
            return Reading(f"a time in {name}", iso_time(number // per_second), name)
    return None


def sensible_range_s(first_s: int, last_s: int) -> tuple[int, int | None]:
    """(low, high): times outside cannot belong to a store with events from first_s to last_s (None: open).

    Before 1971 or after 2200, unless the store has such events itself.
    """
    return (YEAR_1971_S if first_s >= YEAR_1971_S else 0), (YEAR_2200_S if last_s <= YEAR_2200_S else None)


def unit_advice(number: int, unit: str, key: str) -> str:
    """What to do about a number that makes no sense as a time in `unit`; key: the config key of the unit."""
    if (reading := likely_unit(number, unit=unit)) is not None:
        return f"in {reading.unit} it is {reading.iso}: set {key}={reading.unit}"
    if (reading := written_date(number)) is not None:
        return f"it looks like {reading.name}: write it as an ISO time or date, {reading.iso}"
    return f"check {key}"


def _parse_iso(text: str, key: str) -> int:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{key} '{text}': give an ISO date such as 2001-01-31, or seconds since 1970") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)  # noqa: UP017
    if (time_s := math.ceil(moment.timestamp())) > YEAR_2200_S:
        raise ValueError(f"{key} '{text}': after the year 2200; give an earlier one")
    return time_s
