"""The processes of a run: one alone, or as many as ``torchrun`` started.

Every function here does nothing on one process, so callers need no ``if``. All ranks must call each of them, in the
same order: they wait for one another, but not for ever. A rank that fails takes the others with it.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Longer than what one rank does while the others wait (preparing data, writing its share of a checkpoint), and short
# beside what a run that hangs costs. It is torch's own for NCCL; gloo's would be half an hour.
PATIENCE = timedelta(minutes=10)


class World(NamedTuple):
    """Which process this is.

    Attributes:
        rank: of this process, 0 to ``size - 1``. Rank 0 writes files and speaks.
        size: how many processes train together.
        device: of this process's tensors.
        ranks_per_node: how many of the processes run on this machine.

    Example:
        >>> World(rank=0, size=8, device=torch.device("cpu"), ranks_per_node=4).size
        8
    """

    rank: int
    size: int
    device: torch.device
    ranks_per_node: int = 1


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
def start_processes(*, patience: timedelta = PATIENCE) -> Iterator[World]:
    """Join the other processes of the launch, if there are any, and leave them at the end.

    The launcher's variables say who is who: ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` as ``torchrun`` sets them.
    NCCL carries tensors of GPUs, gloo those of CPUs. A process group that exists already is used, and left alone; it
    needs no launcher. The rank's GPU is then that of ``LOCAL_RANK``, or the current one where that is not set.

    An exception leaves at once. The orderly end would wait for the others, who wait for this rank, and nobody would
    read the traceback; so the process group stays as it is until the process ends, which is soon, and then breaks the
    others' connections. ``torchrun`` is told the traceback, and repeats it in its summary. A process whose
    ``torchrun`` is gone ends within seconds, so that no rank trains on, unseen, in the folder of the next launch.

    Args:
        patience: how long a rank waits for the others before it ends with an error.

    Yields:
        World.

    Raises:
        ValueError: if there is no process group yet, and only some of the launcher's variables are set, or SLURM
            started several tasks without them; if one is no number; or if a rank has no GPU where others have one.

    Example:
        >>> with start_processes() as world:
        ...     world.rank, world.size
        (0, 1)
    """
    joined = dist.is_available() and dist.is_initialized()
    if not joined and "RANK" not in os.environ and _number("SLURM_STEP_NUM_TASKS", 1) > 1:
        raise ValueError(
            f"this is one of {os.environ['SLURM_STEP_NUM_TASKS']} tasks of a SLURM step without RANK, so each would "
            "train alone in the same folder. Let srun start torchrun, one task per node, and torchrun the ranks"
        )
    with _reported_errors(), _end_with_launcher():
        if not joined and _number("WORLD_SIZE", 1) == 1:
            yield one_process()
            return
        device = _join(patience, joined=joined)
        size = dist.get_world_size()
        yield World(dist.get_rank(), size, device, _number("LOCAL_WORLD_SIZE", size))
        if not joined:  # not in a finally: see above
            dist.destroy_process_group()


def under_torchrun() -> bool:
    """Say whether a torchrun agent started this process, and will start it again if it ends with an error.

    Returns:
        Whether it did.

    Example:
        >>> under_torchrun()
        False
    """
    return dist.is_available() and dist.is_torchelastic_launched()


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


def _join(patience: timedelta, *, joined: bool) -> torch.device:
    """Make the process group unless there is one; return the device of this rank."""
    if not joined:
        _check_launcher()
    if not torch.cuda.is_available():
        device, backend, bound = torch.device("cpu"), "gloo", None
    else:
        local = _number("LOCAL_RANK", -1)
        local = torch.cuda.current_device() if local < 0 else local
        _check_gpus(local)
        torch.cuda.set_device(local)
        device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
        bound = device  # NCCL then connects here, where its errors are understood, and not in the first step
    if not joined:
        dist.init_process_group(backend, timeout=patience, device_id=bound)
    return device


def _number(name: str, default: int) -> int:
    """Return a launcher's variable; the default where it is empty or not set."""
    value = os.environ.get(name, "").strip()
    if value and not value.isdecimal():
        raise ValueError(f"{name} is {value!r} in the environment; expected a number, as launchers set it, or nothing")
    return int(value or default)


def _check_launcher() -> None:
    missing = [
        name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if missing:
        raise ValueError(
            f"this is one of {os.environ.get('WORLD_SIZE', '?')} processes by WORLD_SIZE, but {', '.join(missing)} "
            "is not set. Start them with torchrun, which sets all of them, or unset WORLD_SIZE for a single process"
        )


def _check_gpus(local: int) -> None:
    gpus = torch.cuda.device_count()
    if local >= gpus:
        raise ValueError(
            f"LOCAL_RANK is {local}, but this process sees {gpus} GPU(s), and a rank takes that of its number. Start "
            f"at most {gpus} a node (torchrun --nproc-per-node {gpus}), or let each see all GPUs of its node; or hide "
            "them with CUDA_VISIBLE_DEVICES= and compute on the CPU"
        )


@contextmanager
def _reported_errors() -> Iterator[None]:
    """Write an exception into the file that torchrun reads, if it named one."""
    try:
        yield
    except Exception as error:
        if dist.is_available() and dist.is_torchelastic_launched():
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        raise


@contextmanager
def _end_with_launcher() -> Iterator[None]:
    """End this process, hard, when the torchrun that started it is gone: SIGKILL lets it tell nobody."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield
        return
    left = threading.Event()
    threading.Thread(target=_watch, args=(os.getppid(), left), name="launcher", daemon=True).start()
    try:
        yield
    finally:
        left.set()


def _watch(launcher: int, left: threading.Event) -> None:
    while not left.wait(1.0):
        if os.getppid() != launcher:  # an orphan gets another parent
            print("torchrun is gone, so this rank ends; go on from the last checkpoint", file=sys.stderr, flush=True)
            os._exit(1)  # the main thread may be inside a collective that never returns
