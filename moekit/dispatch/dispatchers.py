"""Dispatchers: a plan and the pair of moves that carry it out."""

from functools import partial

from torch import Tensor

from moekit.dispatch.plans import Priority, by_position, dropless_plan, padded_plan
from moekit.dispatch.rows import gather_rows, scatter_rows
from moekit.ratios import is_positive, ratio_of
from moekit.types import Dispatcher, Ratio


def dropless() -> Dispatcher:
    """Return the dispatcher that drops nothing and pads nothing.

    Causal. No host synchronisation. Deterministic on CUDA for token choice.

    Returns:
        Dispatcher of ``dropless_plan``, ``gather_rows`` and ``scatter_rows``.

    Example:
        >>> dropless().plan.__name__
        'dropless_plan'

    References:
        Gale et al., MegaBlocks, 2022 (dropless MoE), https://arxiv.org/abs/2211.15841
    """
    return Dispatcher(dropless_plan, gather_rows, scatter_rows)


def padded(*, capacity_factor: float | Ratio, priority: Priority = by_position) -> Dispatcher:
    """Return the dispatcher that gives every expert C rows; a capacity factor of 0 means dropless, as in OpenLM.

    Causal with ``by_position`` only. No host synchronisation. Deterministic on CUDA for token choice.

    Args:
        capacity_factor: >= 0, see ``capacity``.
        priority: who keeps a place when an expert is full.

    Returns:
        Dispatcher of ``padded_plan``, ``gather_rows`` and ``scatter_rows``, or that of ``dropless``.

    Raises:
        ValueError: if the capacity factor is None, a tensor, negative or not finite, or the priority no function.

    Example:
        >>> padded(capacity_factor=0) == dropless()
        True

    References:
        Lepikhin et al., GShard, 2020, section 2.2 (expert capacity), https://arxiv.org/abs/2006.16668
    """
    if not callable(priority):
        raise ValueError(
            f"padded: priority = {priority!r}; expected a function of moekit.dispatch: by_position, by_choice or "
            f"by_weight."
        )
    if not isinstance(capacity_factor, Tensor) and capacity_factor == 0:
        return dropless()
    if capacity_factor is None or not is_positive(capacity_factor):
        raise ValueError(
            f"capacity_factor = {capacity_factor!r}; expected a finite number >= 0, where 0 means dropless. "
            f"1.25 is OpenLM's default; of a tensor take .item()."
        )
    plan = partial(padded_plan, capacity_factor=ratio_of(capacity_factor), priority=priority)
    return Dispatcher(plan, gather_rows, scatter_rows)
