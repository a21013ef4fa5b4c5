"""The page that describe.py writes: one HTML file, nothing outside it. store_page.html is its template."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from elastic_rec.feature_store.inspection.statistics import StoreStatistics
from elastic_rec.feature_store.table.schema import UNITS_PER_SECOND
from elastic_rec.feature_store.table.store import Store
from elastic_rec.pipeline.reports.store_figures import PERCENTILES, duration
from elastic_rec.pipeline.reports.store_plots import plot_days, plot_gaps, plot_items, plot_lengths, plot_values

TEMPLATE = Path(__file__).with_suffix(".html")
FILTERS = {
    "at": lambda key, mapping: mapping[key],
    "duration": duration,
    "number": lambda value, decimals=None: f"{value:,}" if decimals is None else f"{value:,.{decimals}f}",
    "percent": lambda share, decimals=1: f"{share:.{decimals}%}",
    "short": lambda value: _short(str(value)),
}


def page(store: Store, statistics: StoreStatistics, figures: dict) -> str:
    """The whole page; every value in it is escaped.

    figures: store_figures(), with "impressions" where the store has some.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= FILTERS
    plots = {
        "lengths": plot_lengths(statistics, list(figures["max_history"])),
        "days": plot_days(statistics),
        "popularity": plot_items(statistics),
        "gaps": plot_gaps(statistics, UNITS_PER_SECOND[store.time_unit]),
        "context": {
            name: plot_values([(_short(str(id)), count) for id, count in column["top"]], figures["events"])
            for name, column in figures["context"].items()
        },
    }
    checks_found = list(dict.fromkeys(name for version in figures["versions"] for name in version["checks"] or ()))
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(**figures, path=store.path, percents=PERCENTILES, plots=plots, checks_found=checks_found)


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
