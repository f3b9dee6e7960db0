"""A process group for tests that need one and no other process."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed import ProcessGroup


@pytest.fixture
def group() -> Iterator[ProcessGroup]:
    """Start a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()
