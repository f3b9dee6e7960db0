"""The plan of the fused layer: a list of tensors, as operators take it, and what kernels see in it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from moekit.operators import operator


def plan_routing(
    experts: Tensor, tokens: Tensor, num_tokens: int, num_experts: int, height: int, align: int, most: int
) -> list[Tensor]:
    """Plan a routing: ``plan_layer``, and the lists of each token's assignments if they are no (T, K)."""
    plan = plan_layer(experts, num_experts, height, align, most)
    if experts.ndim != 2 and experts.numel():
        plan = [*plan, *_lists_of_tokens(experts, tokens, num_tokens)]
    return plan


def _plan_fake(experts: Tensor, num_experts: int, height: int, align: int, most: int) -> list[Tensor]:
    from moekit.experts.kernels import _tiles_triton

    if experts.numel() == 0:
        return [experts.new_empty(experts.shape)]
    num_rows = _tiles_triton.aligned_rows(most, num_experts, align)
    length = 3 * num_experts + 1 + _tiles_triton.most_tiles(num_rows, num_experts, height)
    return [experts.new_empty(experts.shape), experts.new_empty(num_rows), experts.new_empty(length, dtype=torch.int32)]


@operator("fused_plan", _plan_fake)
def plan_layer(experts: Tensor, num_experts: int, height: int, align: int, most: int) -> list[Tensor]:
    """Make the plan of expert numbers (*A), -1 for an assignment that does not exist; at most so many do."""
    from moekit.experts.kernels import _plan_triton

    check_num_experts(num_experts, experts.device)
    if experts.numel() == 0:
        return [experts.new_empty(experts.shape)]
    rows, assignments, schedule = _plan_triton.make_plan(experts, num_experts, height=height, align=align, most=most)
    return [rows, assignments, schedule.table]


def check_num_experts(num_experts: int, device: torch.device) -> None:
    """Refuse more experts than a program of the plan's kernels has shared memory to count the assignments of.

    The counts are four bytes for each expert and for what is missing, in a power of two of them: 64 KiB up to
    E = 16,383, which every card has, then 128 KiB up to 32,767, and then 256 KiB.

    Args:
        num_experts: E.
        device: of the kernels.

    Raises:
        ValueError: if the device has less.

    Example:
        >>> check_num_experts(512, torch.device("cuda"))
    """
    if num_experts >= 2**14 and num_experts > (most := _most_experts(device)):
        raise ValueError(
            f"fused_layer: E = {num_experts} experts; expected at most {most} on {device}, whose shared memory holds "
            f"the counts of no more. Compose the layer of expert_layer and loop, which takes any number."
        )


@cache
def _most_experts(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 2**31 - 1
    counts = torch.cuda.get_device_properties(device).shared_memory_per_block_optin // 4  # type: ignore[attr-defined]
    return int(2 ** (counts.bit_length() - 1) - 1)


def _lists_of_tokens(experts: Tensor, tokens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Order assignments (N,) by token, stably, those that do not exist last; return also where each token's begin."""
    keys = torch.where(experts < 0, num_tokens, tokens).to(torch.int32)  # half the passes of int64
    found = torch.sort(keys, stable=True)
    ends = torch.arange(num_tokens + 1, dtype=torch.int32, device=keys.device)
    return found.indices, torch.searchsorted(found.values, ends)


def plan_of(tensors: list[Tensor], num_experts: int) -> Any:
    """View the tensors of a plan as kernels know them."""
    from moekit.experts.kernels._fused_triton import Plan
    from moekit.experts.kernels._lists_triton import TokenLists
    from moekit.experts.kernels._tiles_triton import Schedule

    rows, assignments, table, *lists = tensors
    return Plan(rows, assignments, Schedule(table, num_experts), TokenLists(*lists) if lists else None)
