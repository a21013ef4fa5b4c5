"""One flipped bit anywhere in a store: noticed when it is read, or of no effect on what is read; verify() finds it."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from states import folder_of
from store_files_cases import full_store

from elastic_rec.feature_store.inspection.verify import Findings, verify_store
from elastic_rec.feature_store.reading.lookup import HistoryLookup
from elastic_rec.feature_store.reading.row_groups import Decoder
from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.location import open_location
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError

FLIPS = 150


def everything(root: Path) -> list:
    """All that readers give of a store, in a form that can be compared."""
    store = Store.open(root)
    found = [store.manifest.hash, Store.open(root, version=0).manifest.hash]
    decoder = Decoder(store, store.columns)
    for group in range(len(decoder.groups)):
        users = decoder.decode(group)
        found += [users.offsets, users.times, *users.columns.values(), decoder.lengths(group)]
        found.append(decoder.user_ids(group).to_pylist())
    users = sorted({user for part in found if isinstance(part, list) for user in part})
    looked_up = HistoryLookup(store, columns=store.columns).histories(users)
    found += [looked_up.rows, looked_up.offsets, looked_up.times_s, store.user_ids(looked_up.rows).to_pylist()]
    for column in ["user", *store.columns]:
        vocabulary = store.vocabulary(column)
        found += [vocabulary.ids.to_pylist(), vocabulary.counts]
    table = ImpressionTable(store)
    for file, entry in enumerate(table.manifest.files):
        rows = table.read(file, 0, entry.num_impressions)
        found += [rows.users.to_pylist(), rows.times, *rows.candidates, rows.labels]
        found += [part for bag in rows.context.values() for part in bag]
    found += [part for bag in table.item_bags.values() for part in bag]
    found += [table.vocabulary(name).ids.to_pylist() for name in (*table.context, *table.item_context)]
    for file in store.files:
        states = folder_of(store).open(file)
        if states is None:
            raise DataError("states that are not continued: they are made again")
        rows = np.arange(len(states.user_ids))
        found += [
            states.user_ids.to_pylist(),
            states.watermarks.time,
            states.watermarks.num_events,
            states.watermarks.num_at_time,
        ]
        found += [states.read(rows), states.about["path"]]
    return found


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(map(_same, one, other))


def _same(a, b) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f") if isinstance(a, np.ndarray) else a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return Path(full_store(tmp_path_factory.mktemp("flips")).path)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def outcome(root: Path, path: Path, bit: int, before: list) -> str:
    flip(path, bit)
    try:
        findings = Findings()
        verify_store(open_location(root), findings)
        if findings.broken:
            assert len(findings.broken) <= 2 and all(str(root) in line for line in findings.broken)
        try:
            now = everything(root)
        except DataError as error:
            assert path.name in str(error) or "states that" in str(error) or "version" in str(error), error
            return "noticed when read"
        if same(now, before):
            return "found by verify, of no effect" if findings.broken else "of no effect"
        return "found by verify alone" if findings.broken else f"silent: {path} bit {bit}"
    finally:
        flip(path, bit)


def test_flipped_bits(whole, tmp_path):
    root = tmp_path / "store"
    shutil.copytree(whole, root)
    before, draw = everything(root), np.random.default_rng(0)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    assert same(everything(root), before)
    outcomes: Counter[str] = Counter()
    for number in range(FLIPS):
        path = files[number % len(files)]
        outcomes[outcome(root, path, int(draw.integers(path.stat().st_size * 8)), before)] += 1
    print(dict(outcomes))
    assert outcomes["noticed when read"] > FLIPS / 2
    assert not [each for each in outcomes if "silent" in each or "alone" in each], outcomes
