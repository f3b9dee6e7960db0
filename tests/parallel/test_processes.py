import json
import os
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moekit.parallel import World, all_sum, any_true, one_process, share, start_processes, wait

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*LAUNCHER, "LOCAL_WORLD_SIZE"):
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


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
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


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_a_launchers_number_that_is_none_is_named_and_an_empty_one_is_not_set(monkeypatch, name):
    monkeypatch.setenv(name, "abc")
    with pytest.raises(ValueError, match=f"{name} is 'abc' in the environment; expected a number"), start_processes():
        pass
    monkeypatch.setenv(name, "")
    with start_processes() as world:
        assert world.size == 1


def test_a_group_that_exists_is_used_and_left_alone(group):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(LAUNCHER, ("0", "1", "0", "127.0.0.1", "1"), strict=True):
            patch.setenv(name, value)
        with start_processes() as world:
            assert (world.rank, world.size) == (0, 1)
    assert dist.is_initialized()


@pytest.mark.parametrize("tasks", [None, "2"])
def test_a_group_that_exists_needs_no_launcher(monkeypatch, tasks, group):
    """As processes that a program spawned, or srun started, have one."""
    if tasks is not None:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with start_processes() as world:
        assert world == World(0, 1, torch.device("cpu"))
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with start_processes() as world:
        assert world.device == torch.device("cuda", 3)
    assert chosen == [3]
    assert dist.is_initialized()


def test_one_process_asks_nobody():
    world = World(0, 1, torch.device("cpu"))
    tensor, value = torch.randn(3), object()
    assert all_sum(world, tensor) is tensor
    assert any_true(world, True) is True
    assert any_true(world, False) is False
    assert share(world, value) is value
    wait(world)
    assert not dist.is_initialized()


def test_several_processes_talk(monkeypatch, group):
    """A group of one process, taken for two: sums and votes go through it, and the argument stays as it is."""
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


class _Joined:
    """Stands in for a process group of two, beside so many GPUs, and writes down how it was made and left."""

    def __init__(self, monkeypatch, gpus=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        self.made, self.left = {}, 0
        for name, value in zip(LAUNCHER, ("1", "2", "1", "127.0.0.1", "1"), strict=True):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: self.made.update(given, on=backend))
        monkeypatch.setattr(dist, "destroy_process_group", self._leave)
        monkeypatch.setattr(dist, "get_rank", lambda: 1)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)

    def _leave(self):
        self.left += 1


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_rank_has_its_own_device_and_limited_patience(monkeypatch, gpus):
    joined, chosen = _Joined(monkeypatch, gpus), []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with start_processes(patience=timedelta(seconds=7)) as world:
        device = torch.device("cuda", 1) if gpus else torch.device("cpu")
        assert world == World(1, 2, device, ranks_per_node=2)
        assert joined.left == 0
    backend, bound = ("cpu:gloo,cuda:nccl", torch.device("cuda", 1)) if gpus else ("gloo", None)
    assert joined.made == {"on": backend, "timeout": timedelta(seconds=7), "device_id": bound}
    assert chosen == [1] * (gpus > 0)
    assert joined.left == 1


def test_a_rank_without_a_gpu_beside_ranks_that_have_one_is_explained(monkeypatch):
    joined = _Joined(monkeypatch, gpus=1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda local: pytest.fail("no such device"))
    message = r"LOCAL_RANK is 1, but this process sees 1 GPU\(s\).* --nproc-per-node 1\)"
    with pytest.raises(ValueError, match=message), start_processes():
        pass
    assert joined.made == {}


def test_the_launcher_says_how_many_ranks_a_node_has(monkeypatch):
    _Joined(monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with start_processes() as world:
        assert (world.size, world.ranks_per_node) == (2, 1)


def test_ten_minutes_of_patience_unless_told_otherwise(monkeypatch):
    joined = _Joined(monkeypatch)
    with start_processes():
        pass
    assert joined.made["timeout"] == timedelta(minutes=10)


def test_an_exception_waits_for_nobody_and_torchrun_is_told(monkeypatch, tmp_path):
    joined, file = _Joined(monkeypatch), tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    with pytest.raises(KeyError, match="what went wrong"), start_processes():
        raise KeyError("what went wrong")
    assert joined.left == 0
    told = json.loads(file.read_text())["message"]
    assert told["message"] == "KeyError: 'what went wrong'"
    assert "test_an_exception_waits_for_nobody" in told["extraInfo"]["py_callstack"]
    assert not [thread for thread in threading.enumerate() if thread.name == "launcher" and not _ends(thread)]


def test_without_torchrun_nobody_is_told_or_watched(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with start_processes():
        assert "launcher" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(KeyError), start_processes():
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_rank_ends_when_its_torchrun_is_gone(ranks):
    """A parent that stands in for torchrun starts a rank, hears that it watches, and ends."""
    rank = (
        "import sys, time, torch.distributed as dist\n"
        "dist.init_process_group, dist.get_rank, dist.get_world_size = lambda *a, **k: None, lambda: 0, lambda: 2\n"
        "from moekit.parallel import start_processes\n"
        "with start_processes():\n"
        "    print('watching', flush=True)\n"
        "    time.sleep(60)\n"
    )
    launcher = (
        "import subprocess, sys\n"
        f"rank = subprocess.Popen([sys.executable, '-c', {rank!r}], stdout=subprocess.PIPE, text=True)\n"
        "print(rank.stdout.readline(), end='')\n"
    )
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": ranks, "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "CUDA_VISIBLE_DEVICES": ""}
    # The rank holds the pipe of errors open for as long as it lives, so this returns when it has ended.
    done = subprocess.run(
        [sys.executable, "-c", launcher], env=environment, capture_output=True, text=True, timeout=40, check=False
    )
    assert done.stdout == "watching\n", done.stderr
    assert "torchrun is gone, so this rank ends" in done.stderr


def _ends(thread):
    thread.join(5)
    return not thread.is_alive()
