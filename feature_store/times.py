"""Moments as people write them."""

from __future__ import annotations

import math
from datetime import datetime, timezone


def parse_time_s(text: str | int | float) -> int:
    """ISO date or time (UTC unless it carries a zone), or epoch seconds -> whole seconds, rounded up: an event at
    t seconds (floored) is before the moment exactly where t < the result."""
    try:
        return math.ceil(float(text))
    except (ValueError, OverflowError):
        pass
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError as error:
        raise ValueError(f"time '{text}': give an ISO date such as 2001-01-31, or seconds since 1970") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)  # noqa: UP017
    return math.ceil(moment.timestamp())
