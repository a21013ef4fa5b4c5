"""describe.py: figures that are right, a page that stands by itself, refusals, and no half pages."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import fail, run
from ranking_data import make_ranking_store

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.checks import ChecksConfig
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.inspection.statistics import measure
from elastic_rec.feature_store.table.store import Store
from elastic_rec.pipeline.config.describe import DescribeConfig
from elastic_rec.pipeline.describe import target_of
from elastic_rec.pipeline.reports.store_figures import duration, store_figures
from elastic_rec.pipeline.reports.store_page import page
from elastic_rec.pipeline.runtime.errors import ConfigError

DAY_S = 86_400
NASTY = "<script>alert(1)</script>&$x^2$"


class Parsed(HTMLParser):
    """Tags that are opened and closed in order, text, and pictures decoded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text, self.pictures = "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            kind, data = dict(attrs)["src"].split(",")
            assert kind == "data:image/svg+xml;base64"
            self.pictures.append(base64.b64decode(data).decode())
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write(path: Path, rows: list[tuple]) -> str:
    columns = dict(zip(("user_id", "item_id", "timestamp", "action"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.fixture
def store(tmp_path) -> Path:
    """Three users with 1, 2 and 5 events on three days; one event out of order; then a day is appended."""
    rows = [(1, NASTY, 10 * DAY_S, "view"), (2, "b", 10 * DAY_S + 9, "view"), (2, NASTY, 10 * DAY_S, "buy")]
    rows += [(3, NASTY, 10 * DAY_S + 100 * i, "view") for i in range(4)] + [(3, "c", 12 * DAY_S, "buy")]
    config = IngestConfig(
        input=[write(tmp_path / "a.parquet", rows)],
        context_columns=["action"],
        num_buckets=2,
        out=str(tmp_path / "mine"),
        name="<my> events",
    )
    ingest(config)
    day = write(tmp_path / "b.parquet", [(4, "d", 13 * DAY_S, "view")])
    append(AppendConfig(input=[day], store=str(tmp_path / "mine")))
    return tmp_path / "mine"


def test_figures_and_page(store):
    figures = run("describe", f"store={store}", "max_history=[3,1]")
    assert figures["report"] == f"{store}.html"
    assert (figures["users"], figures["events"], figures["items"], figures["version"]) == (4, 9, 4, 1)
    lengths = {"0": 1, "1": 1, "5": 1, "25": 1, "50": 1, "75": 2, "95": 5, "99": 5, "100": 5}
    assert figures["lengths"] == {**lengths, "mean": 2.25}
    assert list(figures["max_history"]) == ["1", "3"]
    assert figures["max_history"]["3"] == {"users_cut": 0.25, "events_cut": 2 / 9}
    assert (figures["first_time"], figures["last_time"]) == ("1970-01-11T00:00:00Z", "1970-01-14T00:00:00Z")
    assert figures["days"] == {
        "with_events": 3, "spanned": 4, "busiest": "1970-01-11", "busiest_events": 7, "median_events": 1,
    }  # fmt: skip
    assert figures["popularity"]["top"][0] == [NASTY, 6] and figures["popularity"]["once"] == 3
    assert figures["gaps"]["count"] == 5 and figures["gaps"]["s"]["100"] == 2 * DAY_S - 300
    assert figures["context"] == {"action": {"values": 2, "unknown": 0, "top": [["view", 7], ["buy", 2]]}}
    assert [(g["version"], g["events"], g["input_events"]) for g in figures["versions"]] == [(0, 8, 8), (1, 9, 1)]
    assert [g["checks"]["out_of_order"] for g in figures["versions"]] == [1, 0]
    for line in ("9 events of 4 users and 4 items", "1 keeps 44.4%; 3 keeps 77.8%", "3 items occur once"):
        assert line in figures["stderr"]

    text = Path(figures["report"]).read_text()
    parsed = Parsed(text)
    assert parsed.open == [] and len(parsed.pictures) == 5
    assert "script" not in parsed.tags and NASTY in parsed.text and "<my> events" in parsed.text
    assert not re.search(r"(src|href)=\"(?!data:)", text), "nothing from outside the file"
    for picture in parsed.pictures:
        ElementTree.fromstring(picture)

    again = run("describe", f"store={store}", "version=0", f"out={store.parent / 'new' / 'old.html'}")
    assert again["events"] == 8 and (store.parent / "new" / "old.html").is_file()


def test_the_same_store_gives_the_same_page(store):
    def render() -> str:
        opened = Store.open(store)
        statistics = measure(opened)
        return page(opened, statistics, store_figures(opened, statistics, [50, 200]))

    assert render() == render()


def test_impressions_are_on_the_page(tmp_path):
    store = make_ranking_store(tmp_path)
    figures = run("describe", f"store={store}")
    text = Parsed(Path(figures["report"]).read_text()).text
    assert f"{figures['impressions']['impressions']:,} impressions of" in text
    assert f"{figures['impressions']['labels']['click']['mean']:.4g}" in text


def test_odd_stores_have_pages_too(tmp_path):
    """One event; every gap 0; a time beyond the calendar."""
    for number, rows in enumerate(
        ([(1, "a", 0, "v")], [(1, "a", 5, "v"), (1, "a", 5, "v")], [(1, "a", 0, "v"), (2, "a", 10**15, "v")])
    ):
        source = write(tmp_path / f"{number}.parquet", rows)
        checks = ChecksConfig(future_times="keep")
        ingest(config := IngestConfig(input=[source], out=str(tmp_path / f"store{number}"), checks=checks))
        opened = Store.open(config.out)
        figures = store_figures(opened, statistics := measure(opened), [50])
        json.dumps(figures)
        assert Parsed(page(opened, statistics, figures)).open == []


def test_refusals_leave_what_was_there(store, tmp_path):
    report = Path(f"{store}.html")
    report.write_text("an older page")
    for settings, match in (
        ({}, "store is empty"),
        ({"store": str(store), "out": str(tmp_path)}, "is a folder: name the file to write"),
        ({"store": "memory://mine"}, "not on the local disk: say with out=FILE.html"),
    ):
        with pytest.raises(ConfigError, match=match):
            target_of(DescribeConfig(**settings))
    with pytest.raises(ValueError, match="max_history=\\[0\\]: set at least 1"):
        DescribeConfig(max_history=[0])
    code, stderr = fail("describe", f"store={store}", "version=7")
    assert code == 2 and "no version 7; there are 0, 1" in stderr
    data = next((store / "bucket=0001").glob("*.parquet"))
    data.write_bytes(data.read_bytes()[:-1])
    code, stderr = fail("describe", f"store={store}")
    assert code == 2 and data.name in stderr
    assert report.read_text() == "an older page" and not list(tmp_path.glob("*.tmp"))


def test_durations():
    cases = {0: "0 s", 0.25: "0.25 s", 59: "59 s", 600: "10 min", 19_080: "5.3 h", 1_080_000: "12.5 days"}
    for seconds, text in (cases | {88_923_270: "2.8 years", 3_153_600_000_000: "100,000.0 years"}).items():
        assert duration(seconds) == text
