"""Options: defaults are copied, enums are taken by value, bounds are enforced by name, and OmegaConf can hold them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import pytest
from omegaconf import OmegaConf

from elastic_rec.configs.options import Options, bounds_of, option


class Kind(Enum):
    a = "a"
    b = "b"


@dataclass
class Inner(Options, prefix="inner."):
    size: int = option(4, "size", at_least=1, at_most=8)


@dataclass
class Outer(Options):
    kind: Kind = option(Kind.a, "kind")
    maybe: Kind | None = option(None, "kind or none")
    rate: float = option(0.5, "rate", above=0)
    k: list[int] = option([10], "lengths", at_least=1)
    device: str = option("auto", "device", choices=("auto", "cpu"))
    inner: Inner = option(Inner, "more")


def test_defaults_are_not_shared():
    first, second = Outer(), Outer()
    first.k.append(3)
    assert second.k == [10] and first.inner is not second.inner


def test_enums_are_taken_by_value_and_none_stays():
    assert Outer(kind="b").kind is Kind.b and Outer(maybe="a").maybe is Kind.a and Outer().maybe is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Inner(size=0), "inner.size=0: set at least 1, at most 8"),
        (lambda: Inner(size=9), "inner.size=9: set at least 1, at most 8"),
        (lambda: Outer(rate=0.0), "rate=0.0: set above 0"),
        (lambda: Outer(rate=float("nan")), "rate=nan: set above 0"),
        (lambda: Outer(k=[5, 0]), r"k=\[5, 0\]: set at least 1"),
        (lambda: Outer(device="gpu"), "device=gpu: set one of auto, cpu"),
        (lambda: Outer(kind="c"), "kind=c: set a or b"),
    ],
)
def test_what_is_out_of_bounds_is_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_omegaconf_keeps_types_and_bounds():
    config = OmegaConf.structured(Outer)
    config.inner.size = 7
    config.kind = "b"
    made = OmegaConf.to_object(config)
    assert isinstance(made, Outer) and made.inner == Inner(size=7) and made.kind is Kind.b
    config.inner.size = 70
    with pytest.raises(ValueError, match=r"inner\.size=70"):
        OmegaConf.to_object(config)


def test_bounds_in_words():
    assert bounds_of(Inner.__dataclass_fields__["size"].metadata) == "at least 1, at most 8"
