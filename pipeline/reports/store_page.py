"""The page that describe.py writes: one HTML file, nothing outside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

from elastic_rec.feature_store.inspection.statistics import StoreStatistics
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.store import Store
from elastic_rec.pipeline.reports.store_figures import PERCENTILES, duration
from elastic_rec.pipeline.reports.store_plots import plot_days, plot_gaps, plot_items, plot_lengths, plot_values

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2330; max-width: 980px; margin: 2.5em auto; padding: 0 1em }
h1 { font-size: 1.6em; margin-bottom: 0 }
h2 { font-size: 1.15em; margin: 2.2em 0 .4em; border-bottom: 1px solid #d8dce3; padding-bottom: .2em }
h3 { font-size: 1em; margin: 1.4em 0 .2em }
p, .note { color: #4b5563; margin: .4em 0 }
.note { font-size: .88em }
img { width: 100%; margin: .4em 0 }
table { border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; font-size: .93em }
th, td { padding: .18em .9em .18em 0; text-align: right; border-bottom: 1px solid #eceef2 }
th { font-weight: 600; color: #4b5563 }
th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto }
dl { display: flex; flex-wrap: wrap; gap: .4em 2.6em; margin: 1.2em 0 }
dt { color: #4b5563; font-size: .85em }
dd { margin: 0; font-size: 1.3em; font-variant-numeric: tabular-nums }
code { font-size: .9em }
"""


def page(store: Store, statistics: StoreStatistics, figures: dict) -> str:
    """figures: store_figures(), with "impressions" where the store has some."""
    sections = [
        _head(store, figures),
        *_lengths(statistics, figures),
        *_days(statistics, figures),
        *_items(statistics, figures),
        *_gaps(statistics, figures, UNITS_PER_SECOND[store.time_unit]),
        *_context(figures),
        *_impressions(figures.get("impressions")),
        *_written(figures),
    ]
    title = escape(f"{figures['name']}, version {figures['version']}")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def _head(store: Store, figures: dict) -> str:
    facts = {
        "events": f"{figures['events']:,}",
        "users": f"{figures['users']:,}",
        "items": f"{figures['items']:,}",
        "first event": figures["first_time"][:10],
        "last event": figures["last_time"][:10],
        "on disk": f"{figures['bytes'] / 1e6:,.1f} MB",
    }
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    where = f"{store.path}, version {figures['version']}, hash {figures['hash'][:12]}"
    return f"<h1>{escape(figures['name'])}</h1><p><code>{escape(where)}</code></p><dl>{shown}</dl>"


def _lengths(statistics: StoreStatistics, figures: dict) -> Iterator[str]:
    lengths = figures["lengths"]
    yield "<h2>History length</h2>"
    yield plot_lengths(statistics, list(figures["max_history"]))
    yield _percentile_table("events per user", [f"{lengths[p]:,}" for p in PERCENTILES], f"{lengths['mean']:,.1f}")
    rows = [
        (f"{limit:,}", f"{c['users_cut']:.2%}", f"{c['events_cut']:.2%}") for limit, c in figures["max_history"].items()
    ]
    yield _table(("max_history", "users cut", "events cut"), rows)


def _days(statistics: StoreStatistics, figures: dict) -> Iterator[str]:
    days = figures["days"]
    yield "<h2>Events per day</h2>"
    yield plot_days(statistics)
    yield (
        f"<p>{figures['first_time']} to {figures['last_time']}: {days['with_events']:,} of {days['spanned']:,} days "
        f"have events, {days['median_events']:,} in the median, {days['busiest_events']:,} on the busiest "
        f"({days['busiest']}).</p>"
    )


def _items(statistics: StoreStatistics, figures: dict) -> Iterator[str]:
    items = figures["popularity"]
    yield "<h2>Item popularity</h2>"
    yield plot_items(statistics)
    yield (
        f"<p>The top 1% of the items have {items['top_1_percent']:.1%} of the events, the top 10% "
        f"{items['top_10_percent']:.1%}; half of the events fall on {items['items_of_half_the_events']:,} items. "
        f"{items['once']:,} items occur once. {items['unknown']:.2%} of the events are of unknown items.</p>"
    )
    yield _value_table("item", items["top"], figures["events"])


def _gaps(statistics: StoreStatistics, figures: dict, units_per_second: int) -> Iterator[str]:
    gaps = figures["gaps"]
    yield "<h2>Time between events of a user</h2>"
    if not gaps["count"]:
        yield "<p>No user has two events.</p>"
        return
    yield plot_gaps(statistics, units_per_second)
    yield _percentile_table("gap", [duration(gaps["s"][p]) for p in PERCENTILES])
    yield (
        f"<p>{gaps['zero']:.2%} of the {gaps['count']:,} gaps are 0: events of equal time, whose order is that of the "
        "event ids, or else of the input.</p>"
        '<p class="note">Percentiles of gaps are read from 64 bins per doubling, too small by 1.6% at most; 0 and the '
        "longest are exact, as is every other figure on this page.</p>"
    )


def _context(figures: dict) -> Iterator[str]:
    if figures["context"]:
        yield "<h2>Context columns</h2>"
    for name, column in figures["context"].items():
        unknown = f", {column['unknown']:,} events unknown" if column["unknown"] else ""
        more = f"; the most frequent {len(column['top'])} are" if column["values"] > len(column["top"]) else ""
        yield f"<h3>{escape(name)}</h3><p>{column['values']:,} values{unknown}{more}:</p>"
        if column["top"]:
            yield plot_values([_short(id) for id, _ in column["top"]], [n for _, n in column["top"]], figures["events"])


def _impressions(impressions: dict | None) -> Iterator[str]:
    if impressions is None:
        return
    each = impressions["candidates"] / max(1, impressions["impressions"])
    yield "<h2>Impressions</h2>"
    yield (
        f"<p>{impressions['impressions']:,} impressions of {impressions['candidates']:,} candidates ({each:.2f} each), "
        f"{impressions['unknown_candidates']:,} of them of items that no event names.</p>"
    )
    labels = [(name, f"{label['known']:,}", f"{label['mean']:.4g}") for name, label in impressions["labels"].items()]
    yield _table(("label", "candidates that have it", "mean"), labels)
    if impressions["context"]:
        yield _table(("context column", "values"), [(name, f"{n:,}") for name, n in impressions["context"].items()])


def _written(figures: dict) -> Iterator[str]:
    """How the store came to be: filters, then each version with what the checks found in its input."""
    yield "<h2>How it was written</h2>"
    filters = [(name, f"{value:,}" if isinstance(value, int) else value) for name, value in figures["filters"].items()]
    yield _table(("filter", "value"), [(name, "none" if value is None else value) for name, value in filters])
    names = list(dict.fromkeys(name for g in figures["versions"] for name in g["checks"] or ()))
    rows = [
        [
            f"{g['version']}{' (this one)' if g['version'] == figures['version'] else ''}",
            *(f"{g[key]:,}" for key in ("users", "events", "input_files", "input_events")),
            *(f"{g['checks'][name]:,}" if name in (g["checks"] or ()) else "not kept" for name in names),
        ]
        for g in figures["versions"]
    ]
    yield "<h3>Versions, and what the checks found in the events that came with them</h3>"
    head = ("version", "users", "events", "new files", "new events", *(name.replace("_", " ") for name in names))
    yield f'<div class="wide">{_table(head, rows)}</div>'


def _percentile_table(what: str, cells: list[str], mean: str | None = None) -> str:
    head = ["least", *(f"{p}%" for p in PERCENTILES[1:-1]), "most"]
    extra = ([], []) if mean is None else (["mean"], [mean])
    return _table((what, *head, *extra[0]), [("", *cells, *extra[1])])


def _value_table(what: str, values: list[list], num_events: int) -> str:
    rows = [(_short(id), f"{count:,}", f"{count / num_events:.2%}") for id, count in values]
    return _table((f"most frequent {what}s", "events", "share"), rows)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    def cells(row: Iterable[object], tag: str) -> str:
        return "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(head, 'th')}</tr>{body}</table>"
