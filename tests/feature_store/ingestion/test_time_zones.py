"""The same instants give the same bytes whatever the machine's zone, in every form a log may have them."""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import REPO

ZONES = ("UTC", "America/New_York", "Asia/Kolkata")
# The clocks of New York go back at 06:00Z: local times of the three rise, fall, rise.
INSTANTS = [dt.datetime(2023, 11, 5, hour, minute, tzinfo=dt.UTC) for hour, minute in ((5, 45), (6, 15), (7, 0))]
SECONDS = [int(at.timestamp()) for at in INSTANTS]
ITEMS = ["first", "second", "third"]


def events(times: pa.Array, items: list[str] = ITEMS, ids: list[int] | None = None) -> pa.Table:
    return pa.table({"user_id": [1] * len(items), "item_id": items, "timestamp": times,
                     "event_id": ids or list(range(len(items)))})  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    zoned = pa.array(INSTANTS, pa.timestamp("us", "UTC"))
    naive = zoned.cast(pa.timestamp("us"))
    forms = {
        "zoned": pa.array(INSTANTS, pa.timestamp("us", "Europe/Berlin")),
        "naive": naive,
        "nanoseconds": zoned.cast(pa.timestamp("ns", "UTC")),
        "seconds": pa.array(SECONDS),
    }
    for name, times in forms.items():
        pq.write_table(events(times), folder / f"{name}.parquet")
    pq.write_table(events(naive), folder / "int96.parquet", use_deprecated_int96_timestamps=True)
    berlin = dt.timezone(dt.timedelta(hours=1))
    texts = {"zoned": [at.astimezone(berlin).isoformat() for at in INSTANTS],
             "naive": [at.strftime("%Y-%m-%d %H:%M:%S") for at in INSTANTS]}  # fmt: skip
    texts["zoned"][2] = INSTANTS[2].strftime("%Y-%m-%dT%H:%M:%S.000Z")
    for name, times in texts.items():
        lines = [f"1,{item},{at},{n}" for n, (item, at) in enumerate(zip(ITEMS, times, strict=True))]
        (folder / f"{name}.csv").write_text("\n".join(["user_id,item_id,timestamp,event_id", *lines]) + "\n")
    more = [*INSTANTS, INSTANTS[0] + dt.timedelta(minutes=10), INSTANTS[2] + dt.timedelta(hours=1)]
    new_york = pa.array(more, pa.timestamp("ns", "America/New_York"))
    pq.write_table(events(new_york, [*ITEMS, "late", "new"], [0, 1, 2, 3, 4]), folder / "again.parquet")
    shown_at = pa.array([dt.datetime(2023, 11, 5, 6, 10, tzinfo=dt.UTC)], pa.timestamp("us", "UTC"))
    shown = {"user_id": [1], "item_id": [["third", "second"]], "click": [[1, 0]], "timestamp": shown_at}
    pq.write_table(pa.table(shown), folder / "shown.parquet")
    return folder


def in_zone(zone: str, inputs: Path, out: Path) -> dict:
    """What times_in_a_zone.py makes there; Spark in one zone only, it takes long."""
    has_spark = shutil.which("java") is not None or "JAVA_HOME" in os.environ
    spark = ["spark"] if zone == "America/New_York" and has_spark else []
    script = REPO / "tests/support/times_in_a_zone.py"
    environment = os.environ | {"TZ": zone, "PYSPARK_PYTHON": sys.executable}
    done = subprocess.run(
        [sys.executable, str(script), str(inputs), str(out), *spark], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_the_same_bytes_in_every_zone(inputs, tmp_path):
    made = {zone: in_zone(zone, inputs, tmp_path / zone) for zone in ZONES}
    assert [made[zone].pop("zone") for zone in ZONES] == ["UTC", "EST", "IST"]
    spark = made["America/New_York"]["digests"].pop("spark", None)
    first = made["UTC"]
    assert set(first["digests"].values()) == {first["digests"]["seconds"]}
    assert spark in (None, first["digests"]["seconds"])
    for zone in ZONES:
        assert made[zone] == first, zone
    late, new = SECONDS[0] + 600, SECONDS[2] + 3600
    want = [*zip(SECONDS, ITEMS, strict=True), (late, "late"), (new, "new")]
    assert first["histories"] == sorted(map(list, want))
    assert first["appended"] == [3, 2] and first["late"] == 1
    # It saw "first" and "late", not what came five minutes after it.
    assert first["impressions"] == first["candidates"] == [SECONDS[0] + 1500]
    assert sum(at < first["impressions"][0] for at, _ in first["histories"]) == 2
