"""One user with two million events among a thousand ordinary ones: ingest, batches by budget, windows, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.table.store import Store

LONG, BUDGET, WINDOW = 2_000_000, 65_536, 4096
MIB = 1 << 20
# Two leaves of int64; reading holds a few copies of them (decoded, in its block, in its batch), windows one more.
HISTORY_BYTES = 2 * 8 * LONG

READ = """
import json, sys
import numpy as np
from elastic_rec.feature_store.utils.progress import peak_memory_bytes
from elastic_rec.feature_store.reading.history_reader import HistoryReader
from elastic_rec.feature_store.batches.splits import SplitConfig
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.batches.windows import HistoryWindows

store, budget, size = Store.open(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
before = peak_memory_bytes()
reader = HistoryReader(store, columns=["item"], global_batch_size=4096, shuffle=True, seed=1, events_per_batch=budget)
batches, sums, last, windows = [], 0, -1, 0
for histories in reader.epoch(0):
    lengths = np.diff(histories.offsets)
    batches.append([len(lengths), int(lengths.sum())])
    if lengths.max() <= budget:
        continue
    cut = HistoryWindows(histories, size=size, split=SplitConfig(), stage="score", max_history=1 << 31, seed=0,
                         epoch=0, world_size=1)
    for number in range(cut.count):
        batch = cut.batch(number, cut.count)
        assert len(batch.times_s) <= size and int(batch.times_s.min()) >= last, "in order, and no more than the window"
        last, windows = int(batch.times_s.max()), windows + 1
        sums += int(batch.features["item"].values().sum())
print(json.dumps({"batches": batches, "windows": windows, "items": sums, "peak": peak_memory_bytes() - before}))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("long")
    rng = np.random.default_rng(0)
    users = np.concatenate([np.full(LONG, 7), rng.integers(100, 1100, 100_000)])
    order = rng.permutation(len(users))
    events = {
        "user_id": users[order],
        "item_id": rng.integers(1, 5001, len(users)),
        "timestamp": 1_600_000_000 + rng.integers(0, 100_000_000, len(users)),
    }
    pq.write_table(pa.table(events), folder / "events.parquet")
    ingest(IngestConfig(input=[str(folder / "events.parquet")], out=str(folder / "store"), memory_limit="200MB"))
    return Store.open(folder / "store")


def test_he_has_a_row_group_of_his_own(store):
    groups = [group for file in store.files for group in file.row_groups]
    assert (1, LONG) in groups
    assert all(events <= store.manifest.row_group_events for users, events in groups if (users, events) != (1, LONG))


def test_batches_windows_and_memory(store):
    done = subprocess.run(
        [sys.executable, "-c", READ, str(store.path), str(BUDGET), str(WINDOW)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert sum(events for _, events in found["batches"]) == store.num_events
    assert [b for b in found["batches"] if b[1] > BUDGET] == [[1, LONG]], "alone in his batch"
    assert found["windows"] == -(-LONG // WINDOW)
    items = pq.read_table(next(Path(store.path).glob("bucket=0007/part-*.parquet")))
    long = int(np.argmax(items["num_events"].to_numpy()))
    flat = items["events"].combine_chunks()[long].values.field("item").to_numpy()
    assert found["items"] == int(flat.sum())
    print(f"peak beyond the program: {found['peak'] / MIB:.0f} MiB")
    assert found["peak"] < 10 * HISTORY_BYTES
