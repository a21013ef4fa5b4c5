"""JSON as dataclasses, checked while it is read. Fields have the names of keys, and the order that they are written in.

Count = Annotated[int, lambda value: value >= 0]

@dataclass
class Part:
    path: str
    rows: Count = 0                                                        may be absent
    note: str | None = None                                                absent where there is none
    version: int = field(default=0, metadata={"json": "generation"})       has another name in the file
    size: int = field(default=0, metadata={"json": ""})                    is not in the file
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, NoReturn, get_args, get_origin, get_type_hints

Fail = Callable[[str, Any], NoReturn]  # (place, value found there): raises
ABSENT = object()


def from_json(kind: Any, value: Any, fail: Fail, place: str = "") -> Any:
    """`value`, of json.loads, as `kind`: a dataclass, list[...], dict[str, ...], Annotated[..., predicate], X | None,
    int, str, list or dict. Calls fail("files.3.bytes", value) where it is no such thing, with ABSENT for a key that is
    missing. Unknown keys are passed over."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        found = from_json(inner[0], value, fail, place)
        return found if inner[1](found) else fail(place, value)
    if type(None) in inner:
        return None if value is None else from_json(inner[0], value, fail, place)
    if type(value) is not (dict if is_dataclass(kind) else origin or kind):  # a bool is no int
        fail(place, value)
    if is_dataclass(kind):
        return _object(kind, value, fail, place)
    if origin is list:
        return [from_json(inner[0], each, fail, _at(place, str(number))) for number, each in enumerate(value)]
    if origin is dict:
        return {key: from_json(inner[1], each, fail, _at(place, key)) for key, each in value.items()}
    return value


def to_json(value: Any) -> Any:
    """What json.dumps takes, and from_json reads."""
    if is_dataclass(value):
        return {
            key: to_json(found)
            for about, key in _keys(type(value))
            if (found := getattr(value, about.name)) is not None or about.default is not None
        }
    if isinstance(value, dict):
        return {key: to_json(each) for key, each in value.items()}
    return [to_json(each) for each in value] if isinstance(value, list) else value


def _object(kind: Any, value: dict, fail: Fail, place: str) -> Any:
    hints, found = _hints(kind), {}
    for about, key in _keys(kind):
        if key in value:
            found[about.name] = from_json(hints[about.name], value[key], fail, _at(place, key))
        elif about.default is MISSING:
            fail(_at(place, key), ABSENT)
    return kind(**found)


def _at(place: str, key: str) -> str:
    return f"{place}.{key}" if place else key


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


@cache
def _keys(kind: type) -> list[tuple[Any, str]]:
    """(field, key) of each field that is in the file."""
    named = ((about, about.metadata.get("json", about.name)) for about in fields(kind))
    return [(about, key) for about, key in named if key]
