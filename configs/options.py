"""Configuration keys as dataclass fields: default, help and bounds of a key in one line.

    @dataclass
    class OptimConfig(Options, prefix="optim."):
        epochs: int = option(20, "passes over the users", at_least=1)
        schedule: Schedule = option(Schedule.cosine, "how learning rates fall")       an Enum: also given by its value
        columns: list[str] = option([], "event columns to embed")                     a mutable default is copied
        model: TowerConfig = option(TowerConfig, "the tower")                         a class is called for the default

The generated reference (docs/reference/config.md) shows help and bounds; `Options.__post_init__` enforces them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import field, fields
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] = (),
) -> Any:
    """A dataclass field for one key. Bounds hold for a number, or for each element of a list; None is never checked."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "choices": choices or None}
    metadata = {"help": help, **{name: bound for name, bound in bounds.items() if bound is not None}}
    if isinstance(default, type) or (callable(default) and not isinstance(default, Enum)):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def bounds_of(metadata: Any) -> str:
    """The bounds of an option in words: "at least 1, at most 4096"; "" without bounds."""
    bounds = {name: metadata[name] for name in _CHECKS if name in metadata}
    words = [f"{name.replace('_', ' ')} {b if isinstance(b, int) else format(b, 'g')}" for name, b in bounds.items()]
    if "choices" in metadata:
        words.append("one of " + ", ".join(str(choice) for choice in metadata["choices"]))
    return ", ".join(words)


class Options:
    """Base of configuration dataclasses. prefix: what stands before a key of this class in messages, "optim."."""

    _prefix: ClassVar[str] = ""

    def __init_subclass__(cls, prefix: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._prefix = prefix or cls._prefix

    def __post_init__(self) -> None:
        """Turns values of enums into members and checks bounds. Raises ValueError with key, value and bounds."""
        enums = _enums(type(self))  # type: ignore[arg-type]
        for about in fields(self):  # type: ignore[arg-type]
            name, value = about.name, getattr(self, about.name)
            if name in enums and value is not None:
                setattr(self, name, self._member(name, enums[name], value))
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if each is not None and not _is_inside(each, about.metadata):
                    raise ValueError(f"{self._prefix}{name}={value}: set {bounds_of(about.metadata)}")

    def _member(self, name: str, kind: type[Enum], value: Any) -> Enum:
        try:
            return kind(value)
        except ValueError:
            members = " or ".join(str(member.value) for member in kind)
            raise ValueError(f"{self._prefix}{name}={value}: set {members}") from None


_CHECKS: dict[str, Callable[[Any, Any], bool]] = {
    "at_least": lambda value, bound: value >= bound,
    "above": lambda value, bound: value > bound,
    "at_most": lambda value, bound: value <= bound,
}


def _is_inside(value: Any, metadata: Any) -> bool:
    if "choices" in metadata and value not in metadata["choices"]:
        return False
    checks = [(check, metadata[name]) for name, check in _CHECKS.items() if name in metadata]
    return not checks or (math.isfinite(value) and all(check(value, bound) for check, bound in checks))


@cache
def _enums(cls: type) -> dict[str, type[Enum]]:
    """The fields of a class that hold a member of an Enum, or None."""
    found = {}
    for name, kind in get_type_hints(cls).items():
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        for each in kinds:
            if isinstance(each, type) and issubclass(each, Enum):
                found[name] = each
    return found
