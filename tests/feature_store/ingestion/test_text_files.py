"""CSV and TSV as they come: quotes, separators, line ends, packing, encodings, headers. Read as meant, or refused."""

import gzip
import json
import shutil

import pyarrow as pa
import pytest
from feature_store_reference import stored_histories

from elastic_rec.feature_store.ingestion.config import IngestConfig
from elastic_rec.feature_store.ingestion.create import ingest
from elastic_rec.feature_store.table.store import Store
from elastic_rec.feature_store.utils.errors import DataError

HEAD = "user_id,item_id,timestamp\n"


def read(tmp_path, name: str, content: str | bytes, **settings) -> list:
    """Items of the file's events, in order of time."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = str(tmp_path / "s")
    figures = ingest(IngestConfig(input=[str(file)], out=out, overwrite=True, threads=1, num_buckets=1, **settings))
    store = Store.open(out)
    assert figures["events"] == store.num_events
    events = [event for history in stored_histories(store, ["item"]).values() for event in history]
    return [event["item"] for event in sorted(events, key=lambda event: event["timestamp"])]


def refused(tmp_path, match: str, name: str, content: str | bytes, **settings) -> None:
    with pytest.raises(DataError, match=match):
        read(tmp_path, name, content, **settings)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tsv_has_no_quotes(tmp_path, end):
    rows = ['u1\ta\t100\t"Heroes', 'u1\t"b\t101\tLow', 'u2\td"\t103\tHeroes"', 'u2\t""\t104\t"']
    text = end.join(["user_id\titem_id\ttimestamp\ttitle", *rows, ""])
    assert read(tmp_path, "a.tsv", text) == ["a", '"b', 'd"', '""']
    # Somebody's quotes round every field: as they stand, or, where that breaks rows, refused with the way out.
    quoted = 'user_id\titem_id\ttimestamp\nu1\t"a\tb"\t1\n'
    refused_by = r"Line: 2.*TSV has no quotes.*set format=csv"
    shutil.rmtree(tmp_path / "s")
    refused(tmp_path, "(?s)" + refused_by, "b.tsv", quoted)
    refused(
        tmp_path, "TSV has no quotes, set format=csv", "c.tsv", '"user_id"\t"item_id"\t"timestamp"\n"u"\t"a"\t"1"\n'
    )
    assert read(tmp_path, "b.tsv", quoted, format="csv") == ["a\tb"]


def test_csv_has_quotes(tmp_path):
    text = HEAD + '1,"a\nb",1\r\n1,"c,d",2\n1,"e""f",3\n1,g"h,4\n'
    assert read(tmp_path, "a.csv", text.replace("\r", "")) == ["a\nb", "c,d", 'e"f', 'g"h']
    refused_text = HEAD + '1,a,1\n1,"b,2\n1,c,3\n'
    shutil.rmtree(tmp_path / "s")
    refused(tmp_path, r"(?s)b\.csv: cannot be read: .*Line: 3.*unterminated quote", "b.csv", refused_text)


def test_long_quoted_texts_that_look_like_rows(tmp_path):
    """DuckDB's parallel parser, which begins in the middle of a file, fails here: the serial one takes its place."""
    title = "\n9,9,9,9" * 20_000
    text = HEAD.strip() + ",title\n" + "".join(f'1,{n},{n},"{title}"\n' for n in range(70))
    assert read(tmp_path, "a.csv", text) == list(range(70))
    with pytest.raises(DataError, match=r"row 71: timestamp 'x' is not a number"):
        read(tmp_path, "a.csv", text + "1,2,x,\n")
    for end in ('1,2,"3,\n', '1,b"c,3,"d'):  # the serial parser loses such a row without a word
        with pytest.raises(DataError, match=r"(?s)a\.csv: cannot be read: .*unterminated quote"):
            read(tmp_path, "a.csv", text + end)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_the_delimiter_is_the_one_that_gives_the_columns(tmp_path, delimiter, bom):
    text = f'{bom}user_id;title;item_id;timestamp\r\n1;"x;y";7;1\r\n1;z;8;2\r\n'
    assert read(tmp_path, "a.csv", text.replace(";", delimiter)) == [7, 8]


@pytest.mark.parametrize("codec", ["gzip", "bz2", "zstd"])
def test_packed_text(tmp_path, codec):
    rows = "".join(f"1,{n},{n}\n" for n in range(20000))
    whole = pack(HEAD + rows, codec)
    name = "a.csv." + {"gzip": "gz", "bz2": "bz2", "zstd": "zst"}[codec]
    assert read(tmp_path, name, whole) == list(range(20000))
    half = rows.index("1,9000,")
    assert read(tmp_path, name, pack(HEAD + rows[:half], codec) + pack(rows[half:], codec)) == list(range(20000))
    store = (tmp_path / "s/manifest.json").read_text()
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole + b"xxxxxxxx", (HEAD + rows).encode()):
        with pytest.raises(DataError, match=rf"{name}: cannot be read as {codec} .*write or copy it again"):
            read(tmp_path, name, damaged)
    assert (tmp_path / "s/manifest.json").read_text() == store


def pack(text: str, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as file:
        file.write(text.encode())
    return sink.getvalue().to_pybytes()


def test_packed_and_plain_text_give_one_store(tmp_path):
    manifests = []
    for name, content in (
        ("a.csv", HEAD.encode() + b"1,2,3\n"),
        ("a.csv.gz", gzip.compress(HEAD.encode() + b"1,2,3\n")),
    ):
        read(tmp_path, name, content)
        manifest = json.loads((tmp_path / "s/manifest.json").read_text())
        manifests.append({k: v for k, v in manifest.items() if k not in ("source", "hash")})
    assert manifests[0] == manifests[1]


def test_what_is_no_utf8_is_named_by_line(tmp_path):
    text = (HEAD + "1,a,1\n1,käse,2\n").encode("latin1")
    refused(
        tmp_path, r"(?s)a\.csv: cannot be read: .*Line: 3.*not utf-8.*iconv -f LATIN1 -t UTF-8 .*a\.csv", "a.csv", text
    )
    refused(tmp_path, r"b\.csv: cannot read the header .*give UTF-8 CSV", "b.csv", (HEAD + "1,a,1\n").encode("utf-16"))
    refused(tmp_path, r"c\.csv: cannot read the header .*give UTF-8 CSV", "c.csv", pack(HEAD + "1,2,3\n", "gzip"))


def test_no_header(tmp_path):
    for name, text in (("a.csv", "1,2,3\n1,3,4\n"), ("b.tsv", "1\t2\t3\n1\t3\t4\n"), ("c.csv", "1;2;3\n")):
        refused(tmp_path, r"column 'user_id' is missing; it has: 1.*write the names into a first line", name, text)
    refused(tmp_path, r"column 'timestamp' is missing; it has: user_id, item_id", "d.csv", "user_id;item_id\n1;2\n")


def test_names_that_differ_in_case(tmp_path):
    text = "User_ID,user_id,ITEM_ID,item_id,timestamp\n1,2,3,4,5\n"
    assert read(tmp_path, "a.csv", text) == [4]
    assert read(tmp_path, "a.csv", text, item_column="ITEM_ID") == [3]
