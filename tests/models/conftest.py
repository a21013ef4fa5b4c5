"""Fixtures of the models' tests."""

import pytest
import torch.distributed as dist


@pytest.fixture
def gloo(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
