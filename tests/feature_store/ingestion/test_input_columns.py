"""Types of columns and names of folders: ids of every type mean what they say, or are refused with the way out."""

import shutil
import uuid
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feature_store_reference import stored_histories

from elastic_rec.feature_store.ingestion.append import append
from elastic_rec.feature_store.ingestion.checks import ChecksConfig
from elastic_rec.feature_store.ingestion.config import AppendConfig, IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.ingestion.impressions.config import ImpressionConfig
from elastic_rec.feature_store.ingestion.impressions.create import ingest_impressions
from elastic_rec.feature_store.table.impression_table import ImpressionTable
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError

ONE_UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")
IDS = [
    (pa.array(["b", "a"], pa.string_view()), ["b", "a"]),
    (pa.array(["b", "a"], pa.large_string()), ["b", "a"]),
    (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"]),
    (pa.array([b"b", "ä".encode()]), ["b", "ä"]),
    (pa.array([b"b", b"a"], pa.binary_view()), ["b", "a"]),
    (pa.array([ONE_UUID.bytes, bytes(16)], pa.uuid()), [str(ONE_UUID), str(uuid.UUID(int=0))]),
    (pa.array([7, 2**63 - 1], pa.uint64()), [7, 2**63 - 1]),
    (pa.array([-7, 5], pa.int8()), [-7, 5]),
    (pa.array([Decimal(2**63 - 1), Decimal(-5)], pa.decimal128(38, 0)), [2**63 - 1, -5]),
    (pa.array([Decimal(5), Decimal("6.000")], pa.decimal128(38, 9)), [5, 6]),
    (pa.array([2.0**53 - 1, -3.0]), [2**53 - 1, -3]),
    (pa.array([2.0**24 - 1, 0.0], pa.float32()), [2**24 - 1, 0]),
    (pa.array([4, 5]).dictionary_encode(), [4, 5]),
]
BAD_IDS = [
    (pa.array([1.0, 2.5]), r"row 2: item 2\.5 does not fit int64 exactly"),
    (pa.array([1.0, 2.0**53]), r"row 2: item 9007199254740992\.0 does not fit int64 exactly; write it as a string"),
    (pa.array([1.0, 2.0**24], pa.float32()), r"row 2: item 16777216\.0 does not fit int64 exactly"),
    (pa.array([1.0, float("nan")]), r"row 2: item nan does not fit int64 exactly"),
    (pa.array([Decimal(1), Decimal(2**63)], pa.decimal128(38, 0)), r"row 2: item Decimal\('\d+'\) does not fit int64"),
    (pa.array([Decimal(1), Decimal("1.5")], pa.decimal128(38, 9)), r"row 2: item .*1\.5.* does not fit int64 exactly"),
    (pa.array([b"a", b"\xff"]), r"(?s)p\.parquet: cannot be read.*hex\(\) makes text of it.*COPY \(SELECT \* REPLACE"),
    (pa.array([b"ab", b"cd"], pa.binary(2)), r"item_id' is fixed_size_binary\[2\].*REPLACE \(hex\(\"item_id\"\)"),
    (pa.array([{"a": 1}, {"a": 2}]), r"item_id' is struct.*DuckDB: COPY .*CAST\(\"item_id\" AS VARCHAR\)"),
]


def events(**columns) -> pa.Table:
    return pa.table({"user_id": pa.array([1, 1]), "item_id": pa.array([1, 2]), "timestamp": pa.array([1, 2])} | columns)


def write(path: Path, table: pa.Table) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def made(tmp_path: Path, *inputs, **settings) -> Store:
    settings |= {"out": str(tmp_path / "s"), "overwrite": True, "threads": 1}
    ingest(IngestConfig(input=[str(entry) for entry in inputs], **settings))
    return Store.open(tmp_path / "s")


def column(store: Store, name: str) -> list:
    return [event[name] for event in stored_histories(store, list({"item": 0, name: 0}))[1]]


def name_of(values: object) -> str:
    return str(values.type) if isinstance(values, pa.Array) else ""


@pytest.mark.parametrize(("values", "want"), IDS, ids=name_of)
def test_ids_of_every_type(tmp_path, values, want):
    is_text = isinstance(want[0], str)
    table = events(item_id=values, **({"c": values} if is_text else {}))
    store = made(tmp_path, write(tmp_path / "p.parquet", table), context_columns=["c"] if is_text else [])
    assert column(store, "item") == want
    assert not is_text or column(store, "c") == want
    store = made(tmp_path, write(tmp_path / "p.parquet", events(user_id=values)))
    assert sorted(stored_histories(store, ["item"])) == sorted(want)


@pytest.mark.parametrize(("values", "match"), BAD_IDS, ids=name_of)
def test_ids_that_would_change_are_refused(tmp_path, values, match):
    with pytest.raises(DataError, match=match):
        made(tmp_path, write(tmp_path / "p.parquet", events(item_id=values)))
    assert not (tmp_path / "s").exists()


def test_the_line_in_a_message_mends_the_file(tmp_path, monkeypatch):
    """What a refusal says to run in DuckDB gives a file that is taken."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.parquet", events(item_id=pa.array([b"ab", b"cd"], pa.binary(2))))
    with pytest.raises(DataError) as refusal:
        made(tmp_path, "p.parquet")
    duckdb.sql(str(refusal.value).split("DuckDB: ")[1])
    assert column(made(tmp_path, "mended.parquet"), "item") == ["6162", "6364"]


def test_files_may_hold_one_id_in_several_types(tmp_path):
    """pandas writes a day with one id missing as floats, a warehouse writes decimals: whole numbers all."""
    days = [
        pa.array([1, 2], pa.int32()),
        pa.array([2.0, 3.0]),
        pa.array([Decimal(3), Decimal(4)], pa.decimal128(38, 0)),
    ]
    files = [write(tmp_path / f"{n}.parquet", events(item_id=values)) for n, values in enumerate(days)]
    assert sorted(column(made(tmp_path, *files[:2]), "item")) == [1, 2, 2, 3]
    append(AppendConfig(input=[str(files[2])], store=str(tmp_path / "s"), threads=1))
    assert sorted(column(Store.open(tmp_path / "s"), "item")) == [1, 2, 2, 3, 3, 4]
    missing = write(tmp_path / "m.parquet", events(item_id=pa.array([9.0, float("nan")])))
    store = made(tmp_path, missing, checks=ChecksConfig(null_ids="drop"))
    assert column(store, "item") == [9]


def test_names_that_differ_in_case(tmp_path):
    table = events(ITEM_ID=pa.array([7, 8]), Item_Id=pa.array([17, 18]))
    file = write(tmp_path / "p.parquet", table)
    for name, want in (("item_id", [1, 2]), ("ITEM_ID", [7, 8]), ("Item_Id", [17, 18])):
        assert column(made(tmp_path, file, item_column=name), "item") == want
    with pytest.raises(DataError, match=r"column 'iTEM_ID' is missing; it has: .*, ITEM_ID, Item_Id"):
        made(tmp_path, file, item_column="iTEM_ID")


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_names_of_hive_folders_are_context(tmp_path, suffix):
    for n, value in enumerate(["dt=2026-01-01", "dt=a%20b", "dt=__HIVE_DEFAULT_PARTITION__"]):
        file = tmp_path / "in" / value / f"part.{suffix}"
        if suffix == "parquet":
            write(file, events(timestamp=pa.array([10 * n, 10 * n + 1])))
        else:
            file.parent.mkdir(parents=True)
            file.write_text(f"user_id,item_id,timestamp\n1,1,{10 * n}\n1,2,{10 * n + 1}\n")
    store = made(tmp_path, tmp_path / "in", context_columns=["dt"])
    assert column(store, "dt") == ["2026-01-01"] * 2 + ["a b"] * 2 + [None] * 2
    assert column(made(tmp_path, tmp_path / "in/dt=2026-01-01", context_columns=["dt"]), "dt") == ["2026-01-01"] * 2
    with pytest.raises(DataError, match=r"column 'day' is missing; it has: .*; its folders: dt\. Set context_columns"):
        made(tmp_path, tmp_path / "in", context_columns=["day"])
    with pytest.raises(DataError, match=r"'dt' is in the name of a folder.*not for timestamp_column.*COPY"):
        made(tmp_path, tmp_path / "in", timestamp_column="dt")
    flat = tmp_path / "in" / f"flat.{suffix}"
    flat.write_bytes(file.read_bytes().replace(b"1,1", b"1,3"))
    with pytest.raises(DataError, match=rf"flat\.{suffix}: column 'dt' is missing"):  # two layouts
        made(tmp_path, tmp_path / "in", context_columns=["dt"])


def shown(tmp_path, *inputs: Path, context: list[str], **about) -> ImpressionTable:
    about |= {"label_columns": ["y"], "context_columns": context, "candidates_column": "shown"}
    config = ImpressionConfig(input=[str(entry) for entry in inputs], **about)
    ingest_impressions(config, out=str(tmp_path / "s"), threads=1)
    return ImpressionTable(Store.open(tmp_path / "s"))


@pytest.mark.parametrize(("values", "want"), IDS, ids=name_of)
def test_impressions_take_the_same_ids(tmp_path, values, want):
    store = made(tmp_path, write(tmp_path / "p.parquet", events(item_id=values)))
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 4], pa.int32()), pa.concat_arrays([values, values]))
    table = pa.table({"user_id": [1.0, 1.0], "timestamp": [5, 6], "shown": lists, "y": pa.array([[0.0, 1.0]] * 2)})
    write(tmp_path / "in/dt=x/000000_0", table)
    write(tmp_path / "in/dt=w/000000_0", table.slice(0, 0))
    found = shown(tmp_path, tmp_path / "in", context=["dt"])
    assert found.num_rows == 2 and found.vocabulary("dt").ids.to_pylist() == ["x"]
    (data,) = (tmp_path / "s/impressions").glob("bucket=*/*.parquet")
    stored = pq.read_table(data, partitioning=None)["candidates"].to_pylist()
    assert [store.vocabulary("item").decode([c["item"] for c in row]).to_pylist() for row in stored] == [want, want]


def test_a_category_beyond_int64_is_refused_and_not_unknown(tmp_path):
    """A hashed feature, as uint64."""
    hashed = pa.array([2**63 + 5, 7], pa.uint64())
    refused = r"(?s)p\.parquet: cannot be read: .*9223372036854775813 .*out of range.*as text\. DuckDB: COPY"
    file = write(tmp_path / "p.parquet", events(c=hashed))
    with pytest.raises(DataError, match=refused):
        made(tmp_path, file, context_columns=["c"])
    made(tmp_path, file)
    lists = pa.array([[1], [2]])
    table = {"user_id": [1, 1], "timestamp": [5, 6], "shown": lists, "y": lists, "c": hashed}
    for values in (hashed, pa.array([hashed.to_pylist(), []], pa.list_(pa.uint64()))):
        with pytest.raises(DataError, match=refused):
            shown(tmp_path, write(tmp_path / "p.parquet", pa.table(table | {"c": values})), context=["c"])


def test_a_label_that_nobody_has_in_one_file(tmp_path):
    """pandas writes a day without a label as a list of nothing."""
    made(tmp_path, write(tmp_path / "p.parquet", events()))
    table = {"user_id": [1], "timestamp": [5], "shown": [[1, 2]]}
    days = [[[0.0, 1.0]], pa.array([[None, None]], pa.list_(pa.null()))]
    files = [write(tmp_path / f"{n}.parquet", pa.table(table | {"y": day})) for n, day in enumerate(days)]
    assert shown(tmp_path, *files, context=[]).num_rows == 2
    with pytest.raises(DataError, match="label 'y' is null for all candidates of 1 impressions"):
        shown(tmp_path, files[1], context=[])


def test_attributes_of_items_of_other_types(tmp_path):
    made(tmp_path, write(tmp_path / "p.parquet", events()))
    lists = write(tmp_path / "l", pa.table({"user_id": [1], "timestamp": [5], "shown": [[1, 2]], "y": [[0, 1]]}))

    def tags(values: pa.Array) -> list:
        file = write(tmp_path / "items", pa.table({"item_id": [1, 2], "tag": values}))
        found = shown(tmp_path, lists, context=[], item_input=str(file), item_context_columns=["tag"])
        return found.vocabulary("tag").decode(found.item_bags["tag"].values).to_pylist()

    assert tags(pa.array([["a", "b"], ["b", "c"]], pa.list_(pa.string(), 2))) == ["a", "b", "b", "c"]
    for values in (pa.array([{"a": 1}, {"a": 2}]), pa.array([b"\xff", b"a"]), pa.array([2**63, 1], pa.uint64())):
        with pytest.raises(DataError, match=r"items: 'tag' is (struct|binary|uint64).*; cast it to int64 or string"):
            tags(values)


def test_a_name_that_the_engine_uses_is_reserved():
    with pytest.raises(ValueError, match="'rowid' is reserved"):
        ImpressionConfig(label_columns=["rowid"])


def test_impressions_are_read_whole_or_refused(tmp_path):
    made(tmp_path, write(tmp_path / "p.parquet", events()))

    def day(name: str, items: list, user: object = 1) -> Path:
        columns = {"user_id": [user], "timestamp": [5], "y": [[0.0] * len(items)], "shown": [items], "SHOWN": [[0]]}
        return write(tmp_path / name, pa.table(columns))

    assert shown(tmp_path, day("a", [1, 2]), day("b", [2, 1], "1"), context=[]).num_rows == 2
    for items, user in (([1, 2.5], 1), (["1", "1.6"], 1), ([1, 2], "1.6"), ([1, 2], 1.5)):
        with pytest.raises(DataError, match=r"c: impression in row 1: .*no id of the store's type"):
            shown(tmp_path, day("c", items, user), context=[])
    with pytest.raises(DataError, match=r"copy\.parquet: the same bytes as .*/a; each row would be counted twice"):
        shown(tmp_path, tmp_path / "a", Path(shutil.copy(tmp_path / "a", tmp_path / "copy.parquet")), context=[])
    items = pa.table({"item_id": pa.array([1.0, 2.0]), "genre": ["a", "b"]})
    about = {"item_input": str(write(tmp_path / "items", items)), "item_context_columns": ["genre"]}
    genres = shown(tmp_path, tmp_path / "a", context=[], **about)
    assert genres.vocabulary("genre").decode(genres.item_bags["genre"].values[2:]).to_pylist() == ["a", "b"]
    write(tmp_path / "items", items.set_column(0, "item_id", pa.array(["1", "2"])))
    with pytest.raises(DataError, match=r"items: item_id is string, not of the store's type \(int64\); cast it"):
        shown(tmp_path, tmp_path / "a", context=[], **about)
    with pytest.raises(DataError, match=r"impression column 'shown' is list<.*struct.*REPLACE"):
        shown(tmp_path, day("d", [{"id": 1}]), context=[])
    with pytest.raises(DataError, match=r"'shown' is missing; it has: .*\. Set candidates_column"):
        shown(tmp_path, write(tmp_path / "e", events()), context=[])
    (tmp_path / "log").mkdir()
    (tmp_path / "log/f.csv").write_text("user_id,timestamp,shown,y\n")
    with pytest.raises(DataError, match=r"f\.csv: is named csv, but parquet is to be read"):
        shown(tmp_path, tmp_path / "log", context=[])
    assert ImpressionTable(Store.open(tmp_path / "s")).num_rows == 1  # the table before stays
