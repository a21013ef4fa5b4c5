"""Whether a manifest could have been written by ingest: paths inside the store's folder, counts that add up.

The hash of a manifest tells an accident. It has no key, so it does not tell a stranger's hand: this does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from elastic_rec.feature_store.table.own_files import DATA_FILE, ITEMS_FILE, VOCABULARY_FILE
from elastic_rec.feature_store.table.schema import ARROW_TYPES, EVENTS, UNITS_PER_SECOND, USER
from elastic_rec.feature_store.table.vocabulary import FIRST
from elastic_rec.feature_store.utils.errors import DataError

Kind = Callable[[Any], bool]


def check_history(manifest: dict, where: str) -> None:
    """Raises DataError where the manifest of a history store at `where` could not have been written by ingest."""
    need = _Needs(where)
    need(manifest, "", _TOP | {"schema": _is_dict, "source": _is_dict, "filters": _is_dict, "num_users": _is_count})
    need(manifest, "", {"num_events": _is_count, "generation": _or_absent(_is_count)})
    need(manifest["schema"], "schema.", {USER: _is_type, EVENTS: _is_dict})
    need(manifest["source"], "source.", {"columns": _is_dict, "files": _is_list_of_dicts})
    vocabularies = manifest["vocabularies"]
    need(vocabularies, "vocabularies.", {"user": _is_dict, "item": _is_dict})
    for column, entry in vocabularies.items():
        need(entry, f"vocabularies.{column}.", {"type": _is_type})
    _check_data_files(need, manifest, counts=("num_users", "num_events"), times=True)
    _check_paths(need, [*manifest["files"], *vocabularies.values()])


def check_impressions(manifest: dict, where: str) -> None:
    """The same for the manifest of a store's impressions."""
    need = _Needs(where)
    names = dict.fromkeys(("labels", "context", "item_context"), _is_list_of_names)
    need(manifest, "", _TOP | names | {"store": _is_digest, "item_ids": _is_dict, "source": _is_list_of_dicts})
    need(manifest, "", {"num_impressions": _is_count, "num_candidates": _is_count, "num_unknown_candidates": _is_count})
    need(manifest, "", {"time_percentiles": _is_percentiles, "items": _or_absent(_is_dict)})
    need(manifest["item_ids"], "item_ids.", {"size": _is_count, "sha256": _is_digest})
    columns = [*manifest["context"], *manifest["item_context"]]
    need(manifest["vocabularies"], "vocabularies.", dict.fromkeys(columns, _is_dict))
    _check_data_files(need, manifest, counts=("num_impressions", "num_candidates"), times=False)
    items = [manifest["items"]] if manifest["items"] else []
    for entry in items:
        need(entry, "items.", _FILE | {"path": lambda path: bool(ITEMS_FILE.fullmatch(path))})
    _check_paths(need, [*manifest["files"], *manifest["vocabularies"].values(), *items])


def _check_data_files(need: _Needs, manifest: dict, *, counts: tuple[str, str], times: bool) -> None:
    """Files and vocabularies; counts: names of the rows and of what the rows hold, in files and in all."""
    kinds = _FILE | dict.fromkeys(counts, _is_count) | {"row_groups": _is_pairs, "footer": _or_absent(_is_digest)}
    kinds |= {"min_time": _is_int, "max_time": _is_int} if times else {"bucket": _is_count}
    buckets: set[int] = set()
    for number, entry in enumerate(manifest["files"]):
        place = f"files.{number}."
        need(entry, place, kinds)
        match = DATA_FILE.fullmatch(entry["path"])
        bucket = int(match[1]) if match else -1
        need(entry, place, {"path": lambda _, b=bucket: 0 <= b < manifest["num_buckets"] and b not in buckets})
        buckets.add(bucket)
        for at, count in enumerate(counts):
            total = sum(group[at] for group in entry["row_groups"])
            need(entry, place, {count: lambda value, total=total: value == total})
    for count in counts:
        total = sum(entry[count] for entry in manifest["files"])
        need(manifest, "", {count: lambda value, total=total: value == total})
    for column, entry in manifest["vocabularies"].items():
        match = VOCABULARY_FILE.fullmatch(entry["path"]) if isinstance(entry.get("path"), str) else None
        is_named = {"path": lambda _, match=match, column=column: match is not None and match[1] == column}
        need(entry, f"vocabularies.{column}.", _FILE | is_named | {"size": _is_size})


def _check_paths(need: _Needs, entries: list[dict]) -> None:
    paths: set[str] = set()
    for entry in entries:
        need(entry, "", {"path": lambda path: path not in paths})
        paths.add(entry["path"])


class _Needs:
    """need(values, "files.3.", {"bytes": _is_count}): DataError where a key is missing or of another kind."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __call__(self, values: object, place: str, kinds: dict[str, Kind]) -> None:
        for key, fits in kinds.items():
            value = values.get(key, _ABSENT) if isinstance(values, dict) else _ABSENT
            if not fits(value):
                found = "missing" if value is _ABSENT else f"{value!r}"
                raise DataError(
                    f"{self._where}: {place}{key} is {found[:80]}, which no ingest writes: a manifest of other hands "
                    "may name files outside the store. Rerun ingest, or fetch the store from its source again"
                )


_ABSENT = object()


def _or_absent(kind: Kind) -> Kind:
    return lambda value: value is _ABSENT or value is None or kind(value)


def _is_int(value: object) -> bool:
    return type(value) is int  # a bool is no count


def _is_count(value: object) -> bool:
    return _is_int(value) and value >= 0


def _is_size(value: object) -> bool:
    return _is_count(value) and value >= FIRST


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_type(value: object) -> bool:
    return isinstance(value, str) and value in ARROW_TYPES


def _is_list(value: object, kind: Kind) -> bool:
    return isinstance(value, list) and all(kind(each) for each in value)


def _is_list_of_dicts(value: object) -> bool:
    return _is_list(value, _is_dict)


def _is_list_of_names(value: object) -> bool:
    return _is_list(value, lambda name: isinstance(name, str))


def _is_pairs(value: object) -> bool:
    return _is_list(value, lambda pair: isinstance(pair, list) and len(pair) == 2 and all(map(_is_count, pair)))


def _is_percentiles(value: object) -> bool:
    return _is_list(value, _is_int) and len(value) == 101


_FILE: dict[str, Kind] = {"path": lambda path: isinstance(path, str), "bytes": _is_count, "sha256": _is_digest}
_TOP: dict[str, Kind] = {
    "num_buckets": lambda value: _is_int(value) and value > 0,
    "time_unit": lambda value: isinstance(value, str) and value in UNITS_PER_SECOND,
    "files": _is_list_of_dicts,
    "vocabularies": _is_dict,
}
