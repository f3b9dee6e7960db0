"""The processes of a run: one alone, or as many as ``torchrun`` started.

Every function here does nothing on one process, so callers need no ``if``. All ranks must call each of them, in the
same order: they wait for one another.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class World(NamedTuple):
    """Which process this is.

    Attributes:
        rank: of this process, 0 to ``size - 1``. Rank 0 writes files and speaks.
        size: how many processes train together.
        device: of this process's tensors.
    """

    rank: int
    size: int
    device: torch.device


def one_process() -> World:
    """Describe a process that is alone.

    Returns:
        World of size 1, on a GPU if there is one.

    Example:
        >>> one_process().size
        1
    """
    return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def start_processes() -> Iterator[World]:
    """Join the other processes of the launch, if there are any, and leave them at the end.

    The launcher's variables say who is who: ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` as ``torchrun`` sets them.
    NCCL carries tensors of GPUs, gloo those of CPUs. A process group that exists already is used, and left alone.

    Yields:
        World.

    Raises:
        ValueError: if only some of the launcher's variables are set, or SLURM started several tasks without them.

    Example:
        >>> with start_processes() as world:
        ...     world.rank, world.size
        (0, 1)
    """
    joined = dist.is_available() and dist.is_initialized()
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ValueError(
            f"this is one of {os.environ['SLURM_STEP_NUM_TASKS']} tasks of a SLURM step without RANK, so each would "
            "train alone in the same folder. Let srun start torchrun, one task per node, and torchrun the ranks"
        )
    if not joined and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield one_process()
        return
    local = _local_rank()
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not joined:
        dist.init_process_group(backend)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        if not joined:
            dist.destroy_process_group()


def all_sum(world: World, tensor: Tensor) -> Tensor:
    """Add a tensor up over all ranks.

    Args:
        world: of this process.
        tensor: the same shape and dtype on every rank; unchanged.

    Returns:
        The sum, on every rank.

    Example:
        >>> all_sum(one_process(), torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    if world.size == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def any_true(world: World, claim: bool) -> bool:
    """Say whether a claim holds on any rank. The vote goes over the CPU and waits for no GPU.

    Args:
        world: of this process.
        claim: this rank's.

    Returns:
        The same answer on every rank.

    Example:
        >>> any_true(one_process(), False)
        False
    """
    if world.size == 1:
        return claim
    votes = torch.tensor(int(claim))
    dist.all_reduce(votes)
    return bool(votes)


def share(world: World, value: Any) -> Any:
    """Give every rank what rank 0 has.

    Args:
        world: of this process.
        value: anything that pickles; only rank 0's counts.

    Returns:
        Rank 0's value.

    Example:
        >>> share(one_process(), "name")
        'name'
    """
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def wait(world: World) -> None:
    """Wait until every rank is here.

    Args:
        world: of this process.

    Example:
        >>> wait(one_process())
    """
    any_true(world, False)


def _local_rank() -> int:
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise ValueError(
            f"this is one of {os.environ.get('WORLD_SIZE', '?')} processes by WORLD_SIZE, but {', '.join(missing)} "
            "is not set. Start them with torchrun, which sets all of them, or unset WORLD_SIZE for a single process"
        )
    return int(os.environ["LOCAL_RANK"])
