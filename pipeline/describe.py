"""What is in a history store: lengths, days, items, gaps, as a page and as figures.

(Called describe: a script named inspect.py would hide the standard library's `inspect` from everything it imports.)

python pipeline/describe.py store=stores/ml1m
python pipeline/describe.py store=s3://bucket/stores/mine out=mine.html 'max_history=[100,500]'
"""

import sys
import time
from pathlib import Path

from elastic_rec.feature_store.inspection.statistics import describe_impressions, has_impressions, measure
from elastic_rec.feature_store.table.location import Location, open_location
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.progress import peak_memory_bytes
from elastic_rec.pipeline.config.describe import DescribeConfig
from elastic_rec.pipeline.reports.store_figures import headlines, store_figures
from elastic_rec.pipeline.reports.store_page import page
from elastic_rec.pipeline.runtime.errors import ConfigError
from elastic_rec.pipeline.runtime.launch import verb


@verb("describe", DescribeConfig)
def main(config: DescribeConfig) -> dict:
    """Reads the store once, writes the page, and returns the figures."""
    began = time.perf_counter()
    target = target_of(config)
    store = Store.open(config.store, version=config.version)
    statistics = measure(store)
    figures = store_figures(store, statistics, config.max_history)
    if has_impressions(store):
        figures["impressions"] = describe_impressions(store)
    target.replace(page(store, statistics, figures).encode())
    print(headlines(figures), file=sys.stderr, flush=True)
    figures["seconds"] = round(time.perf_counter() - began, 3)
    return {"store": config.store, "report": str(target), **figures, "peak_memory_bytes": peak_memory_bytes()}


def target_of(config: DescribeConfig) -> Location:
    """The HTML file to write; its folder is made. Raises ConfigError where there is none, or `out` is a folder."""
    if not config.store:
        raise ConfigError("store is empty: say which history store to describe")
    place = open_location(config.store)
    if not config.out and not place.is_local:
        raise ConfigError(f"store={config.store} is not on the local disk: say with out=FILE.html where to write")
    target = open_location(config.out or f"{place}.html")
    if target.is_dir():
        raise ConfigError(f"out={target} is a folder: name the file to write, e.g. out={target / 'store.html'}")
    if target.is_local:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    return target


if __name__ == "__main__":
    main()
