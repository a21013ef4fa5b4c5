"""NaN and infinite numbers are refused with the table, row and number."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from elastic_rec.pipeline.runtime.errors import NonFiniteError
from elastic_rec.pipeline.runtime.finite import is_finite, require_finite, require_finite_state
from elastic_rec.pipeline.runtime.world import start_world


@pytest.fixture
def world():
    yield start_world("cpu")
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_each_kind_of_bad_number_is_found_and_named(dtype, number):
    value = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    require_finite(value, "query")
    value[3, 2] = number
    with pytest.raises(NonFiniteError, match=f"^query is {number} in user 'u3'$"):
        require_finite(value, "query", row_name=lambda row: f"user 'u{row}'")


def test_empty_whole_and_single_numbers_are_finite():
    assert is_finite(torch.zeros(0, 3)) and is_finite(torch.arange(3)) and is_finite(torch.zeros(()))
    assert not is_finite(torch.tensor(float("nan")))


def test_a_bad_state_names_its_tensors(world):
    state = {"model": {"item": torch.zeros(4, 2), "bias": torch.zeros(2)}, "step": 3}
    require_finite_state(state, world)
    state["model"]["item"][2, 1] = float("nan")
    state["model"]["bias"][0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"model\.bias is inf in row 0; model\.item is nan in row 2"):
        require_finite_state(state, world)
