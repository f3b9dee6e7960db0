"""Data parallelism: gradients summed over ranks, and parameters sharded over them (ZeRO, by FSDP2).

Gradients are *summed*, never averaged: each rank divides its loss by the tokens of the whole global batch, so the sum
is the gradient of the mean, however unequal the ranks' shares are. Experts that tokens travel to are sharded tensors
(DTensor) of which a rank holds its part; their gradients are complete without any sum, but over replicas.

References:
    Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, 2019,
    https://arxiv.org/abs/1910.02054
    Zhao et al., PyTorch FSDP, 2023, https://arxiv.org/abs/2304.11277; FSDP2 is ``torch.distributed.fsdp.fully_shard``.
"""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moekit.parallel.grids import Grid
from moekit.parallel.spread_tensors import is_spread

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


def distribute_experts(module: nn.Module, grid: Grid, hidden_axes: Mapping[str, int]) -> None:
    """Turn the parameters of this rank's part of the experts into sharded tensors that stand for all experts.

    Args:
        module: whose own parameters are the part; changed in place. Nothing happens unless tokens travel.
        grid: of all ranks.
        hidden_axes: name of each parameter to the axis of its hidden dimension; not needed where that stays whole.

    Example:
        >>> from moekit.parallel import make_grid, one_process, replicated
        >>> experts = nn.Linear(2, 2)
        >>> distribute_experts(experts, make_grid(one_process(), replicated(1, 1)), {})  # no tokens travel
        >>> type(experts.weight).__name__
        'Parameter'
    """
    if grid.experts is None or not grid.layout.exchanges:
        return
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = grid.experts["hidden", "blocks"]
    for name, parameter in list(module.named_parameters(recurse=False)):
        hidden = Shard(hidden_axes[name]) if grid.layout.hidden > 1 else Replicate()
        whole = DTensor.from_local(parameter.detach(), mesh, [hidden, Shard(0)], run_check=False)
        setattr(module, name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def shard_model(
    model: nn.Module,
    units: Iterable[nn.Module],
    grid: Grid,
    *,
    experts: Sequence[nn.Module] = (),
    reduce_dtype: torch.dtype | None = None,
    keep_gathered: bool = False,
) -> None:
    """Shard a whole model: each unit gathers its parameters when it runs, and frees them afterwards.

    Where tokens travel, experts are sharded over the ranks that hold the same ones, and gathered by themselves. All
    else, and experts where none travel, is sharded over all ranks (or those of a shard, see ``make_grid``).

    Args:
        model: changed in place; what no unit holds is gathered by the model itself.
        units: submodules, for example the blocks.
        grid: of all ranks; nothing happens on one process.
        experts: submodules of the units that hold parameters of experts.
        reduce_dtype: None computes in the parameters' own dtype. A dtype computes in bf16 and reduces gradients in
            this one, while parameters and optimizer state stay as they are.
        keep_gathered: free gathered parameters after the backward alone (ZeRO-2): faster, and takes more memory.

    Example:
        >>> from moekit.parallel import make_grid, one_process, replicated
        >>> shard_model(nn.Linear(2, 2), [], make_grid(one_process(), replicated(1, 1)))

    References:
        Rajbhandari et al., ZeRO, 2019, section 5 (stage 3; stage 2 with ``keep_gathered``),
        https://arxiv.org/abs/1910.02054
        Zhao et al., PyTorch FSDP, 2023, https://arxiv.org/abs/2304.11277
    """
    if grid.dense is None:
        return
    left: set[nn.Parameter] = set()
    if grid.layout.exchanges:
        shard_experts(experts, grid, reduce_dtype=reduce_dtype, keep_gathered=keep_gathered)
        left = {p for module in experts if not _is_sharded(module) for p in module.parameters()}
    for module in (*units, model):
        _shard(module, grid.dense, _policy(reduce_dtype), keep_gathered, ignored=left)


def shard_experts(
    modules: Sequence[nn.Module],
    grid: Grid,
    *,
    reduce_dtype: torch.dtype | None = None,
    keep_gathered: bool = False,
) -> None:
    """Shard the parameters of experts over the ranks that hold the same ones.

    Where no axis can be cut evenly, the parameters stay as they are, on each of these ranks.

    Args:
        modules: each with parameters of experts alone; changed in place.
        grid: of all ranks; nothing happens where every rank holds other experts.
        reduce_dtype: see ``shard_model``. Tokens and routing are handed on as they are.
        keep_gathered: see ``shard_model``.

    Example:
        >>> from moekit.parallel import make_grid, one_process, replicated
        >>> shard_experts([nn.Linear(2, 2)], make_grid(one_process(), replicated(1, 1)))
    """
    if grid.experts is None or grid.layout.replicas == 1:
        return
    mesh = grid.experts["copies", "shards"]
    for module in modules:
        if all(_axis(p, mesh["shards"].size()) is not None for p in module.parameters()):
            _shard(module, mesh, _policy(reduce_dtype, cast_inputs=False), keep_gathered)


def shard_axis(shape: Sequence[int], shards: int, *, taken: Collection[int] = ()) -> int | None:
    """Choose the axis along which FSDP cuts a parameter of experts: the first that cuts evenly and is not cut already.

    Args:
        shape: of all experts, (E, ., .).
        shards: how many pieces.
        taken: axes that are cut already.

    Returns:
        The axis. Where none cuts evenly: 0 if nothing is taken, for FSDP can fill up that one, else None.

    Example:
        >>> shard_axis((3, 4, 8), 4), shard_axis((3, 5, 7), 2), shard_axis((4, 6, 5), 2, taken=(0, 1))
        (1, 0, None)
    """
    even = [axis for axis, size in enumerate(shape) if size % shards == 0 and axis not in taken]
    return even[0] if even else None if taken else 0


def gradient_sync(model: nn.Module, *, last: bool) -> None:
    """Let sharded parameters reduce their gradients in the next backward, or hold them back until a later one.

    Args:
        model: changed in place.
        last: whether the next backward is that of the step's last micro-batch.

    Example:
        >>> gradient_sync(nn.Linear(2, 2), last=True)
    """
    for module in model.modules():
        if _is_sharded(module):
            module.set_requires_gradient_sync(last, recurse=False)


def _is_sharded(module: nn.Module) -> "TypeGuard[FSDPModule]":
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def _axis(parameter: Tensor, shards: int) -> int | None:
    placements: Sequence[Any] = parameter.placements if is_spread(parameter) else ()
    taken = [p.dim for p in placements if p.is_shard()]
    return shard_axis(parameter.shape, shards, taken=taken)


def _shard(
    module: nn.Module,
    mesh: DeviceMesh,
    policy: "MixedPrecisionPolicy",
    keep_gathered: bool,
    *,
    ignored: set[nn.Parameter] | None = None,
) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import Shard

    shards = mesh["shards"].size()
    own = {p for p in module.parameters() if p.ndim == 3}
    fully_shard(
        module,
        mesh=mesh if mesh["copies"].size() > 1 else mesh["shards"],
        mp_policy=policy,
        reshard_after_forward=not keep_gathered,
        shard_placement_fn=lambda p: Shard(_axis(p, shards) or 0) if p in own else None,
        ignored_params=ignored,
    )
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def _policy(reduce_dtype: torch.dtype | None, *, cast_inputs: bool = True) -> "MixedPrecisionPolicy":
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if reduce_dtype is None:
        return MixedPrecisionPolicy(cast_forward_inputs=cast_inputs)
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype, cast_forward_inputs=cast_inputs)
