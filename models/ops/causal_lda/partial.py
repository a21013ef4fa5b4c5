"""What a run of events leaves for an expert: a running softmax-weighted sum that can be continued."""

from __future__ import annotations

from typing import NamedTuple

import torch

EMPTY = -1e30  # `max` where there was no event: finite, so that differences of two of them are 0 and not NaN


class Partial(NamedTuple):
    """The weighted sum is e^max · sum, its weights add up to e^max · norm, both as seen at time `clock`.

    max_RHK float64, norm_RHK, sum_RHKe float32 or wider, clock_R int64 seconds (of the newest event; 0: no event).
    R rows: users, chunks or boundaries. Float64 for `max`: its differences over long gaps decide every weight.
    """

    max_RHK: torch.Tensor
    norm_RHK: torch.Tensor
    sum_RHKe: torch.Tensor
    clock_R: torch.Tensor

    @staticmethod
    def empty(rows: int, heads: int, experts: int, width: int, *, dtype=torch.float32, device=None) -> Partial:
        """What no event leaves, in each of some rows."""
        return Partial(
            torch.full((rows, heads, experts), EMPTY, dtype=torch.float64, device=device),
            torch.zeros(rows, heads, experts, dtype=dtype, device=device),
            torch.zeros(rows, heads, experts, width, dtype=dtype, device=device),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )

    def mean(self) -> torch.Tensor:
        """(R, H, K, e), zeros where there was no event."""
        return self.sum_RHKe / (self.norm_RHK + (self.norm_RHK == 0))[..., None]

    def rows(self, index: torch.Tensor) -> Partial:
        """Some rows, in any order; index (X,) int64."""
        return Partial(*(tensor.index_select(0, index) for tensor in self))


def combine(first: Partial, second: Partial, decay_per_s_HK: torch.Tensor) -> Partial:
    """Two adjacent stretches as one; associative. decay_per_s_HK: ln 2 / half-life.

    The first fades by the seconds between the two clocks. The result's clock is the second's, unless that is empty.
    """
    is_empty_R = second.norm_RHK.flatten(1).eq(0).all(1)
    clock_R = torch.where(is_empty_R, first.clock_R, second.clock_R)
    fade_R = (clock_R - first.clock_R).double()[:, None, None] * decay_per_s_HK.double()
    max_first_RHK = first.max_RHK - fade_R
    max_RHK = torch.maximum(max_first_RHK, second.max_RHK)
    scale_first = (max_first_RHK - max_RHK).exp().to(first.norm_RHK.dtype)
    scale_second = (second.max_RHK - max_RHK).exp().to(first.norm_RHK.dtype)
    return Partial(
        max_RHK,
        first.norm_RHK * scale_first + second.norm_RHK * scale_second,
        first.sum_RHKe * scale_first[..., None] + second.sum_RHKe * scale_second[..., None],
        clock_R,
    )
