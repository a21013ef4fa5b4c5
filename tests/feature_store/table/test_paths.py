"""Manifests that name files elsewhere are refused; links are not followed, and foreign files are not deleted."""

import json
import os
from pathlib import Path

import pytest
from feature_store_reference import make_store, random_events
from states import fold_store
from store_files_cases import add_day, add_impressions, full_store
from stores import back, change, clean

from elastic_rec.feature_store.datasets.files import commit_folder
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions
from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.location import open_location
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Store:
    return full_store(tmp_path_factory.mktemp("paths"))


@pytest.fixture
def precious(tmp_path) -> Path:
    """A folder with files named as a store's are."""
    for name in ("part-0123456789abcdef.parquet", "part-000.parquet", "item.parquet", "manifest-000009.json", "a.txt"):
        (tmp_path / "precious" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "precious" / name).write_text("dear")
    return tmp_path / "precious"


def is_whole(precious: Path) -> bool:
    return [path.read_text() for path in precious.iterdir()] == ["dear"] * 5


ELSEWHERE = [
    "../x.parquet",
    "/etc/passwd",
    "bucket=0000/../../x/part-000.parquet",
    "vocab/../manifest.json",
    "states/x",
]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("files.0.path", path) for path in [*ELSEWHERE, "bucket=0009/part-000.parquet", "bucket=0000/x.parquet", 7]),
        *(("vocabularies.item.path", path) for path in [*ELSEWHERE, "vocab/user.parquet", None]),
        ("files.0.path", "the other's"),
        ("files.0.bytes", -1),
        ("files.0.bytes", True),
        ("files.0.sha256", "abc"),
        ("files.0.footer", 3),
        ("files.0.row_groups", [[1]]),
        ("files.0.num_users", 10**9),
        ("files.0.max_time", "now"),
        ("num_events", 7),
        ("num_buckets", 0),
        ("time_unit", "h"),
        ("vocabularies.item.size", 1),
        ("vocabularies.item.type", "pickle"),
        ("vocabularies.user", None),
        ("source.files", [3]),
        ("schema", []),
        ("generation", -1),
    ],
)
def test_a_manifest_of_other_hands_is_refused(whole, place, value):
    manifest = Path(whole.path) / "manifest.json"
    before = manifest.read_bytes()
    value = whole.manifest.files[1].path if value == "the other's" else value
    try:
        manifest.write_text(json.dumps(change(json.loads(before), place, value)))
        with pytest.raises(DataError, match=rf"manifest\.json: {place.split('.')[0]}.* is .*which ingest never writes"):
            Store.open(whole.path)
    finally:
        manifest.write_bytes(before)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("files.0.path", path) for path in ELSEWHERE),
        *(("items.path", path) for path in ELSEWHERE),
        *(("vocabularies.device.path", path) for path in ELSEWHERE),
        ("items.bytes", -1),
        ("num_impressions", -1),
        ("labels", "click"),
        ("time_percentiles", [1]),
        ("item_ids", 7),
    ],
)
def test_a_manifest_of_impressions_of_other_hands_is_refused(whole, place, value):
    manifest = Path(whole.path) / "impressions" / "manifest.json"
    before = manifest.read_bytes()
    try:
        manifest.write_text(json.dumps(change(json.loads(before), place, value)))
        with pytest.raises(DataError, match=rf"manifest\.json: {place.split('.')[0]}.* is .*which ingest never writes"):
            ImpressionTable(whole)
    finally:
        manifest.write_bytes(before)


def test_links_to_a_precious_folder_outlive_every_write(tmp_path, precious):
    store = full_store(tmp_path)
    root = Path(store.path)
    for link in ("bucket=0009", "vocab/mine", "impressions/bucket=0009", "impressions/items/mine", "states/mine"):
        (root / link).symlink_to(precious, target_is_directory=True)
    (root / "bucket=0000" / "part-fedcba9876543210.parquet").symlink_to(precious / "a.txt")
    (root / "bucket=0000" / "notes.txt").write_text("mine")
    (root / "vocab" / "mine.csv").write_text("mine")
    store = add_day(store, tmp_path, seed=4)
    fold_store(store)
    assert clean(store)["deleted_files"] > 0
    add_impressions(store, tmp_path, seed=2)
    back(store, store.version)
    with pytest.raises(DataError, match=r"broken\.parquet: not readable as Parquet"):
        ingest_impressions(_broken_impressions(tmp_path), out=str(root), threads=1)
    with pytest.raises(DataError, match=r"no store wrote \(bucket=0000/notes\.txt, .* more\); move them away"):
        make_store(tmp_path, random_events(50), overwrite=True)
    assert is_whole(precious) and (root / "bucket=0000" / "part-fedcba9876543210.parquet").is_symlink()
    assert (root / "bucket=0000" / "notes.txt").read_text() == (root / "vocab" / "mine.csv").read_text() == "mine"
    Store.open(root).verify()
    assert ImpressionTable(Store.open(root)).num_rows == 60


def _broken_impressions(folder: Path):
    from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig

    (folder / "broken.parquet").write_text("no Parquet")
    return ImpressionConfig(input=[str(folder / "broken.parquet")], label_columns=["click"])


def test_folders_that_look_like_leftovers_are_left_alone(tmp_path, precious):
    """Names that a user may give, too; what a killed ingest leaves has a mark inside."""
    make_store(tmp_path, random_events(50))
    for name in ("store.old-2024", "store.tmp-backup", "store.tmp-12"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("mine")
    (tmp_path / "store.tmp-link").symlink_to(precious, target_is_directory=True)
    (tmp_path / "store.old-link").symlink_to(precious, target_is_directory=True)
    (precious / ".work").mkdir()
    make_store(tmp_path, random_events(60), overwrite=True)
    (precious / ".work").rmdir()
    assert is_whole(precious)
    assert all((tmp_path / name / "manifest.json").exists() for name in ("store.old-2024", "store.tmp-backup"))
    assert (tmp_path / "store.tmp-link").is_symlink() and (tmp_path / "store.tmp-12").is_dir()


@pytest.mark.parametrize("name", [".append", ".work"])
def test_a_link_where_scratch_space_goes_is_refused(tmp_path, precious, name):
    store = make_store(tmp_path, random_events(50))
    (Path(store.path) / name).symlink_to(precious, target_is_directory=True)
    with pytest.raises(DataError, match=rf"{name}: a link, which no store writes; remove it"):
        add_day(store, tmp_path)
    assert is_whole(precious)


def test_an_out_that_is_a_link_stays_one(tmp_path):
    real = make_store(tmp_path / "disk", random_events(50))
    (tmp_path / "store").symlink_to(real.path, target_is_directory=True)
    store = make_store(tmp_path, random_events(70), overwrite=True)
    assert store.num_events == Store.open(real.path).num_events == 70
    assert (tmp_path / "store").is_symlink() and os.listdir(tmp_path / "disk") == ["events.parquet", "store"]


def test_a_failing_ingest_and_a_store_without_its_manifest(tmp_path, precious):
    store = make_store(tmp_path, random_events(50))
    add_day(store, tmp_path)
    (Path(store.path) / "manifest.json").unlink()  # a restore mends that: it must not count as no store
    with pytest.raises(DataError, match=r"a store is there already.*overwrite=true"):
        make_store(tmp_path, random_events(30))
    back(store, 1)
    with pytest.raises(DataError, match="no users left"):
        make_store(tmp_path, random_events(30), overwrite=True, min_user_events=1000)
    assert Store.open(store.path).version == 1
    with pytest.raises(DataError, match=r"no store wrote \(a\.txt, .* and 1 more\)"):
        make_store(precious.parent / "other", random_events(30), out=str(precious), overwrite=True)
    assert is_whole(precious)


def test_elsewhere_foreign_files_are_not_deleted(tmp_path):
    """An object store has no links, but foreign files."""
    out = f"memory://foreign-{tmp_path.name}-{os.getpid()}"
    store = make_store(tmp_path, random_events(50), out=f"{out}/store")
    (open_location(out) / "store" / "thesis.txt").replace(b"dear")
    with pytest.raises(DataError, match=r"no store wrote \(thesis\.txt\)"):
        make_store(tmp_path, random_events(60), out=f"{out}/store", overwrite=True)
    add_day(store, tmp_path)
    clean(store)
    assert (open_location(out) / "store" / "thesis.txt").read_bytes() == b"dear"


def test_a_data_sets_folder_that_is_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "real", target_is_directory=True)
    with commit_folder(tmp_path / "cache", name="x", key={}) as (aside, figures):
        (aside / "events.parquet").write_text("events")
        figures |= {"source": "here", "num_events": 1}
    assert sorted(os.listdir(tmp_path / "real")) == ["complete.json", "events.parquet"]
    assert sorted(os.listdir(tmp_path)) == ["cache", "real"]
