import pytest
import torch
import torch.distributed as dist

from moekit.parallel import World, all_sum, any_true, one_process, share, start_processes, wait

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def test_a_process_without_a_launcher_is_alone():
    with start_processes() as world:
        assert world == one_process()
        assert (world.rank, world.size) == (0, 1)
        assert not dist.is_initialized()


def test_one_process_of_torchrun_is_alone_too(monkeypatch):
    for name, value in zip(LAUNCHER, ("0", "1", "0", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with start_processes() as world:
        assert world.size == 1
        assert not dist.is_initialized()


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR"])
def test_half_a_launcher_is_explained(monkeypatch, missing):
    for name in LAUNCHER:
        if name != missing:
            monkeypatch.setenv(name, "2")
    message = (
        f"this is one of 2 processes by WORLD_SIZE, but {missing} is not set. Start them with torchrun, which sets "
        "all of them, or unset WORLD_SIZE for a single process"
    )
    with pytest.raises(ValueError, match=message), start_processes():
        pass
    assert not dist.is_initialized()


def test_a_group_that_exists_is_used_and_left_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in zip(LAUNCHER, ("0", "1", "0", "127.0.0.1", "1"), strict=True):
                patch.setenv(name, value)
            with start_processes() as world:
                assert (world.rank, world.size) == (0, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_one_process_asks_nobody():
    world = World(0, 1, torch.device("cpu"))
    tensor, value = torch.randn(3), object()
    assert all_sum(world, tensor) is tensor
    assert any_true(world, True) is True
    assert any_true(world, False) is False
    assert share(world, value) is value
    wait(world)
    assert not dist.is_initialized()


def test_several_processes_talk(monkeypatch):
    """A group of one process, taken for two: sums and votes go through it, and the argument stays as it is."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = World(0, 2, torch.device("cpu"))
        reduced = []
        monkeypatch.setattr(dist, "all_reduce", lambda tensor: reduced.append(tensor.add_(1)))
        tensor = torch.zeros(2)
        assert all_sum(world, tensor).tolist() == [1.0, 1.0]
        assert tensor.tolist() == [0.0, 0.0]
        assert any_true(world, False) is True  # the other's vote
        wait(world)
        assert len(reduced) == 3
        assert share(world, {"a": [1, None]}) == {"a": [1, None]}
    finally:
        dist.destroy_process_group()
