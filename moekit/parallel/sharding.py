"""Data parallelism: gradients summed over ranks, and parameters sharded over them (ZeRO, by FSDP2).

Gradients are *summed*, never averaged: each rank divides its loss by the tokens of the whole global batch, so the sum
is the gradient of the mean, however unequal the ranks' shares are.

References:
    Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2019,
    https://arxiv.org/abs/1910.02054
    Zhao et al., PyTorch FSDP, 2023, https://arxiv.org/abs/2304.11277; FSDP2 is ``torch.distributed.fsdp.fully_shard``.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from moekit.parallel.processes import World


def shard_model(
    model: nn.Module, units: Iterable[nn.Module], world: World, *, reduce_dtype: torch.dtype | None
) -> None:
    """Shard a whole model over all ranks: each unit gathers its parameters when it runs, and frees them afterwards.

    Args:
        model: changed in place; what no unit holds is gathered by the model itself.
        units: submodules, for example the blocks.
        world: of this process; nothing happens on one process.
        reduce_dtype: None computes in the parameters' own dtype. A dtype computes in bf16 and reduces gradients in
            this one, while parameters and optimizer state stay as they are.

    Example:
        >>> from moekit.parallel.processes import one_process
        >>> shard_model(nn.Linear(2, 2), [], one_process(), reduce_dtype=None)
    """
    if world.size > 1:
        shard_modules([*units, model], world, reduce_dtype=reduce_dtype)


def shard_modules(modules: Sequence[nn.Module], world: World, *, reduce_dtype: torch.dtype | None = None) -> None:
    """Shard some modules over all ranks, inner ones first; other parameters stay whole on every rank.

    Args:
        modules: changed in place.
        world: of this process; nothing happens on one process.
        reduce_dtype: see ``shard_model``.

    Example:
        >>> from moekit.parallel.processes import one_process
        >>> shard_modules([nn.Linear(2, 2)], one_process())
    """
    if world.size == 1:
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if reduce_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def gradient_sync(model: nn.Module, *, last: bool) -> None:
    """Let sharded parameters reduce their gradients in the next backward, or hold them back until a later one.

    Args:
        model: changed in place.
        last: whether the next backward is that of the step's last micro-batch.

    Example:
        >>> gradient_sync(nn.Linear(2, 2), last=True)
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last, recurse=False)


def sum_gradients(parameters: Iterable[Tensor], world: World) -> None:
    """Add the gradients of whole parameters up over all ranks, in one exchange; sharded ones have been reduced already.

    A parameter without a gradient counts as zero, so that ranks whose tokens reached other parts of the model agree.

    Args:
        parameters: in the same order on every rank; their ``.grad`` is replaced.
        world: of this process.

    Example:
        >>> from moekit.parallel.processes import one_process
        >>> sum_gradients([], one_process())
    """
    if world.size == 1:
        return
    mine = [p for p in parameters if p.requires_grad and not is_sharded(p)]
    for dtype in sorted({p.dtype for p in mine}, key=str):
        group = [p for p in mine if p.dtype == dtype]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in group])
        dist.all_reduce(flat)
        for parameter, piece in zip(group, flat.split([p.numel() for p in group]), strict=True):
            parameter.grad = piece.view_as(parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is in shards on several ranks.

    Args:
        tensor: any.

    Returns:
        Whether it is.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; every rank must ask for it.

    Args:
        tensor: any.

    Returns:
        The same values, whole on this rank.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded; every rank must have the same value.

    Args:
        tensor: changed in place.
        value: of the same shape, whole, on any device and of any dtype.

    Example:
        >>> x = torch.zeros(2)
        >>> fill(x, torch.tensor([1.0, 2.0]))
        >>> x
        tensor([1., 2.])
    """
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device, tensor.dtype)
        tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None))
    else:
        tensor.copy_(value)
