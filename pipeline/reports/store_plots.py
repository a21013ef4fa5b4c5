"""Pictures of a history store, as SVG inside an HTML page. Each function returns an <img>, safe to put into a page."""

from __future__ import annotations

import base64
import io

import matplotlib.dates as mdates
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from elastic_rec.feature_store.ingestion.checks import DAY_S
from elastic_rec.feature_store.inspection.statistics import StoreStatistics, bin_starts
from elastic_rec.pipeline.reports.plots import BLUE, GREY, RED, plt

PERCENT = FuncFormatter(lambda share, _: f"{100 * share:g}%")
DURATIONS_S = {"1 ms": 1e-3, "1 s": 1, "1 min": 60, "1 h": 3600, "1 day": DAY_S, "30 days": 30 * DAY_S}
DURATIONS_S |= {"1 year": 365 * DAY_S, "10 years": 3650 * DAY_S}
QUARTERS = np.array([64, 76, 90, 108]) / 64  # of a doubling, cut where gap_bins are
LAST_DATE = 2_932_896  # days from 1970 to 9999-12-31, the last that a calendar axis knows


def plot_lengths(statistics: StoreStatistics, max_history: list[int]) -> Markup:
    """Left: users by history length. Right: what a limit on the history keeps; max_history are marked."""
    lengths = statistics.lengths
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.2))
    _log_histogram(left, lengths.values.astype(float), lengths.counts)
    left.set(xlabel="events per user", ylabel="share of users, per doubling")
    _count_axis(left.xaxis)
    limits = np.unique(np.append(np.geomspace(1, lengths.values[-1], 200).astype(np.int64), max_history))
    num_events = int((lengths.values * lengths.counts).sum())
    cuts = [statistics.cut(int(limit)) for limit in limits]
    right.plot(limits, [1 - cut.events / num_events for cut in cuts], color=BLUE, label="events kept")
    right.plot(limits, [1 - cut.users / lengths.total for cut in cuts], color=GREY, label="users kept whole")
    for limit in max_history:
        kept = 1 - statistics.cut(limit).events / num_events
        _mark(right, limit, kept, f"{limit:,}: {kept:.1%}", offset=(5, -4), ha="left", va="top")
    right.legend(loc="upper left")
    right.set(xscale="log", xlabel="max_history: newest events of a user that are kept", ylim=(0, 1.05))
    right.yaxis.set_major_formatter(PERCENT)
    _count_axis(right.xaxis)
    return _svg(figure, f"Histories by length; a limit of {max_history[-1]:,} keeps {kept:.1%} of the events")


def plot_days(statistics: StoreStatistics) -> Markup:
    """Events of each day from the first to the last."""
    days, counts = statistics.days.values, statistics.days.counts
    figure, axis = plt.subplots(figsize=(9.6, 2.8))
    # Days without events count 0; a log with a time far off has too many of them to draw.
    if days[-1] - days[0] < 100_000:
        every_day = np.arange(days[0], days[-1] + 1)
        counts = np.bincount(days - days[0], weights=counts, minlength=len(every_day))
        days = every_day
    if days[-1] <= LAST_DATE:
        axis.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator := mdates.AutoDateLocator()))
        axis.xaxis.set_major_locator(locator)
        days = days.astype("datetime64[D]")
        axis.set(xlabel="day (UTC)")
    else:
        axis.set(xlabel="days since 1970-01-01")
        _count_axis(axis.xaxis)
    axis.step(days, counts, where="mid", color=BLUE, lw=1.0)
    axis.fill_between(days, counts, step="mid", color=BLUE, alpha=0.2, lw=0)
    axis.set(ylabel="events per day", ylim=(0, None))
    _count_axis(axis.yaxis)
    return _svg(figure, "Events per day")


def plot_items(statistics: StoreStatistics) -> Markup:
    """Left: events of the item of each rank. Right: share of the events that the most frequent items have.

    Empty for a store without known items."""
    counts = statistics.counts["item"][statistics.ranked()]
    if not len(counts):
        return Markup()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.2))
    ranks = np.unique(np.geomspace(1, len(counts), 400).round().astype(np.int64))
    left.plot(ranks, counts[ranks - 1], color=BLUE)
    left.set(xscale="log", yscale="log", xlabel="rank of the item", ylabel="events of the item")
    _count_axis(left.xaxis)
    _count_axis(left.yaxis)
    covered = np.cumsum(counts) / counts.sum()
    share = ranks / len(counts)
    right.plot(share, covered[ranks - 1], color=BLUE)
    if len(counts) >= 100:
        top = int(np.ceil(0.01 * len(counts)))
        text = f"top 1% of the items:\n{covered[top - 1]:.1%} of the events"
        _mark(right, top / len(counts), covered[top - 1], text, offset=(-6, 4), ha="right", va="bottom")
    right.set(
        xscale="log", xlabel="most frequent items, share of the catalogue", ylabel="share of events", ylim=(0, 1.05)
    )
    right.xaxis.set_major_formatter(PERCENT)
    right.xaxis.set_minor_formatter(NullFormatter())
    right.yaxis.set_major_formatter(PERCENT)
    return _svg(figure, "Item popularity by rank, and the share of events of the most frequent items")


def plot_gaps(statistics: StoreStatistics, units_per_second: int) -> Markup:
    """Gaps by length. Those of 0 are not on the logarithmic axis: the page says how many there are."""
    bins = statistics.gap_bins
    positive = bins.values > 0
    if not positive.any():
        return Markup()
    figure, axis = plt.subplots(figsize=(9.6, 2.8))
    starts = bin_starts(bins.values[positive])
    _log_histogram(axis, starts, bins.counts[positive], total=bins.total, scale=units_per_second)
    low, high = axis.get_xlim()
    axis.set_xticks(*zip(*[(s, name) for name, s in DURATIONS_S.items() if low <= s <= high], strict=True))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set(xlabel="time to the user's next event", ylabel="share of gaps, per doubling")
    return _svg(figure, "Time between neighbouring events of a user")


def plot_values(top: list[tuple[str, int]], total: int) -> Markup:
    """Bars of a column's most frequent values, the greatest first. top: (value, events). total: events of the store."""
    if not top:
        return Markup()
    names, counts = zip(*top, strict=True)
    figure, axis = plt.subplots(figsize=(9.6, 0.5 + 0.24 * len(names)))
    places = np.arange(len(names))
    bars = axis.barh(places, np.array(counts) / total, color=BLUE, height=0.7)
    axis.bar_label(bars, [f"{count:,}" for count in counts], padding=4, fontsize=8)
    axis.set_yticks(places, [name.replace("$", r"\$") for name in names])
    axis.invert_yaxis()
    axis.set(xlabel="share of events", xlim=(0, 1.12 * max(counts) / total))
    axis.xaxis.set_major_formatter(PERCENT)
    axis.tick_params(axis="y", length=0)
    return _svg(figure, "Events by value")


def _log_histogram(
    axis: Axes, values: np.ndarray, counts: np.ndarray, *, total: int | None = None, scale: int = 1
) -> None:
    """Four bars per doubling; those of small integers are of unequal width. The height is a bar's share of the total,
    scaled to a whole doubling. values (>= 1) are shown divided by scale."""
    top = int(np.log2(values[-1])) + 1
    doublings = 2.0 ** np.arange(int(np.log2(values[0])), top + 1)
    edges = np.unique(np.maximum(np.ceil(np.outer(doublings, QUARTERS)), values[0]))
    heights, _ = np.histogram(values, edges, weights=counts)
    shares = heights / (counts.sum() if total is None else total) / np.diff(np.log2(edges))
    axis.stairs(shares, edges / scale, fill=True, color=BLUE, alpha=0.85)
    axis.set_xscale("log")
    axis.yaxis.set_major_formatter(PERCENT)


def _mark(axis: Axes, x: float, y: float, text: str, *, offset: tuple[int, int], ha: str, va: str) -> None:
    axis.plot([x], [y], "o", ms=4, color=RED)
    axis.annotate(text, (x, y), offset, textcoords="offset points", ha=ha, va=va, fontsize=8, color=RED)


def _count_axis(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}" if count >= 1 or count == 0 else ""))
    axis.set_minor_formatter(NullFormatter())


def _svg(figure: Figure, alternative: str) -> Markup:
    """An <img> that holds the picture; the same figures give the same bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    plt.close(figure)
    data = base64.b64encode(drawn.getvalue()).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(alternative, data)
