"""A history store in plain figures: for the last line of describe.py, its summary and its page."""

from __future__ import annotations

import numpy as np

from elastic_rec.feature_store.inspection.statistics import StoreStatistics, top_share
from elastic_rec.feature_store.table.manifest import filed_versions, read_manifest
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.table.times import iso_time
from elastic_rec.feature_store.table.vocabulary import UNKNOWN

PERCENTILES = (0, 1, 5, 25, 50, 75, 95, 99, 100)
TOP_VALUES = 12


def store_figures(store: Store, statistics: StoreStatistics, max_history: list[int]) -> dict:
    """All figures of the store by name. Times in seconds, shares from 0 to 1, sizes in bytes.

    max_history: limits on the history, in events; the figures say what each would cut.
    """
    unit = UNITS_PER_SECOND[store.time_unit]
    first_s, last_s = store.time_range_s()
    return {
        "name": store.manifest.name,
        "version": store.version,
        "hash": store.manifest.hash,
        "bytes": sum(entry.bytes for entry in store.manifest.named_files()),
        "users": store.num_users,
        "events": store.num_events,
        "items": len(statistics.ranked()),
        "first_time": iso_time(first_s),
        "last_time": iso_time(last_s),
        "lengths": {percent: statistics.lengths.percentile(percent) for percent in PERCENTILES}
        | {"mean": round(store.num_events / store.num_users, 3)},
        "max_history": {limit: _cut(store, statistics, limit) for limit in max_history},
        "days": _days(statistics),
        "popularity": _popularity(store, statistics),
        "gaps": _gaps(statistics, unit),
        "context": {name: _values(store, statistics, name) for name in store.columns if name != "item"},
        "checks": store.manifest.checks,
        "filters": store.manifest.filters,
        "versions": _versions(store),
    }


def duration(seconds: float) -> str:
    """For people: 0.2 s, 45 s, 12 min, 5.3 h, 12.5 days, 2.1 years."""
    for limit, size, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h"), (63_072_000, 86_400, "days")):
        if seconds < limit:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds / 31_536_000:,.1f} years"


def headlines(figures: dict) -> str:
    """A few lines for the terminal. figures: of store_figures()."""
    lengths, gaps, items = figures["lengths"], figures["gaps"], figures["popularity"]
    cut = "; ".join(f"{limit:,} keeps {1 - c['events_cut']:.1%}" for limit, c in figures["max_history"].items())
    lines = {
        "store": f"{figures['name']}, version {figures['version']}, {figures['bytes'] / 1e6:,.1f} MB",
        "size": f"{figures['events']:,} events of {figures['users']:,} users and {figures['items']:,} items",
        "time": f"{figures['first_time']} to {figures['last_time']}, events on {figures['days']['with_events']:,} days",
        "history": f"median {lengths[50]:,}, mean {lengths['mean']:,.1f}, 99% up to {lengths[99]:,}, "
        f"longest {lengths[100]:,}",
        "max_history": f"of the events, {cut}",
        "items": f"top 1% have {items['top_1_percent']:.1%} of the events, {items['once']:,} items occur once",
    }
    if gaps["count"]:
        lines["gaps"] = (
            f"median {duration(gaps['s'][50])}, longest {duration(gaps['s'][100])}, {gaps['zero']:.1%} are 0"
        )
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items())


def _cut(store: Store, statistics: StoreStatistics, limit: int) -> dict:
    cut = statistics.cut(limit)
    return {"users_cut": cut.users / store.num_users, "events_cut": cut.events / store.num_events}


def _days(statistics: StoreStatistics) -> dict:
    days, counts = statistics.days.values, statistics.days.counts
    busiest = int(np.argmax(counts))
    return {
        "with_events": len(days),
        "spanned": int(days[-1] - days[0]) + 1,
        "busiest": str(np.datetime64(int(days[busiest]), "D")),
        "busiest_events": int(counts[busiest]),
        "median_events": int(np.sort(counts)[(len(counts) - 1) // 2]),  # the lower median: a number that occurs
    }


def _popularity(store: Store, statistics: StoreStatistics) -> dict:
    ranked = statistics.ranked()
    counts = statistics.counts["item"][ranked]
    half = int(np.searchsorted(np.cumsum(counts), counts.sum() / 2)) + 1 if len(counts) else 0
    return {
        "top_1_percent": top_share(counts, 0.01),
        "top_10_percent": top_share(counts, 0.1),
        "items_of_half_the_events": half,
        "once": int(np.count_nonzero(counts == 1)),
        "unknown": int(statistics.counts["item"][UNKNOWN]) / store.num_events,
        "top": _named(store, "item", ranked[:TOP_VALUES], counts),
    }


def _gaps(statistics: StoreStatistics, unit: int) -> dict:
    bins = statistics.gap_bins
    if not bins.total:
        return {"count": 0}
    zero = int(bins.counts[0]) if bins.values[0] == 0 else 0
    seconds = {percent: statistics.gap_percentile(percent) / unit for percent in PERCENTILES}
    return {"count": bins.total, "zero": zero / bins.total, "s": seconds}


def _values(store: Store, statistics: StoreStatistics, column: str) -> dict:
    ranked = statistics.ranked(column)
    counts = statistics.counts[column]
    return {
        "values": len(ranked),
        "unknown": int(counts[UNKNOWN]),
        "top": _named(store, column, ranked[:TOP_VALUES], counts[ranked]),
    }


def _named(store: Store, column: str, indices: np.ndarray, counts: np.ndarray) -> list[list]:
    """[[raw id, events], ...]"""
    ids = store.vocabulary(column).decode(indices).to_pylist()
    return [[id, int(count)] for id, count in zip(ids, counts, strict=False)]


def _versions(store: Store) -> list[dict]:
    """The versions that are kept, oldest first."""
    entries = []
    for number in filed_versions(store.path) or [store.version]:
        manifest = store.manifest if number == store.version else read_manifest(store.path, number)
        inputs = [entry for entry in manifest.source.files if entry.version == number]
        entries.append(
            {
                "version": number,
                "users": manifest.num_users,
                "events": manifest.num_events,
                "input_files": len(inputs),
                "input_events": sum(entry.events for entry in inputs),
                "checks": manifest.checks,
            }
        )
    return entries
