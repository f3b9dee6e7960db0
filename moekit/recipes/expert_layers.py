"""Expert layers: stages become one, and one is wrapped: kept to a capacity limit, or computed again in its backward."""

import reprlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moekit.checks import check_plan
from moekit.dispatch import without_dropped
from moekit.experts import loop
from moekit.types import Dispatcher, DispatchPlan, ExpertLayer, Experts, Routing


def expert_layer(*, dispatcher: Dispatcher, experts: Experts) -> ExpertLayer:
    """Compose a dispatcher and experts into an expert layer.

    Args:
        dispatcher: plan, dispatch and combine.
        experts: the feed-forward networks over grouped rows, with their matmul bound.

    Returns:
        A function (x (T, D), routing, params) -> (T, D).

    Raises:
        ValueError: if ``dispatcher`` is none, or ``experts`` or their ``matmul`` cannot be called.

    Example:
        >>> from moekit.dispatch import dropless
        >>> from functools import partial
        >>> import torch
        >>> from moekit.experts import grouped, init_gated, swiglu
        >>> from moekit.routing import top_k
        >>> layer = expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=grouped))
        >>> layer(torch.ones(5, 4), top_k(torch.zeros(5, 3), k=2), init_gated(3, 4)).shape
        torch.Size([5, 4])
    """
    check_dispatcher("expert_layer", dispatcher)
    if not callable(experts):
        raise ValueError(
            f"expert_layer: experts are {reprlib.repr(experts)}; expected a function (rows, groups, params) -> rows, "
            f"such as partial(swiglu, matmul=grouped)."
        )
    matmul = experts.keywords.get("matmul", loop) if isinstance(experts, partial) else loop
    if not callable(matmul):
        raise ValueError(
            f"expert_layer: the experts' matmul is {reprlib.repr(matmul)}; expected a function, such as grouped of "
            f"moekit.experts."
        )
    return partial(_expert_layer, dispatcher=dispatcher, experts=experts)


class LayerParts(NamedTuple):
    """What ``expert_layer`` composed.

    Attributes:
        dispatcher: plan, dispatch, combine.
        experts: (rows, groups, params) -> rows.
    """

    dispatcher: Dispatcher
    experts: Experts


def parts_of(layer: Any) -> LayerParts | None:
    """Take a layer of ``expert_layer`` apart.

    Args:
        layer: any expert layer.

    Returns:
        What it was composed of; None of a layer of another kind.

    Example:
        >>> from moekit.experts import fused_layer
        >>> from moekit.recipes import mixtral
        >>> parts_of(mixtral().layer).experts.func.__name__, parts_of(fused_layer())
        ('swiglu', None)
    """
    if not isinstance(layer, partial) or layer.func is not _expert_layer:
        return None
    nothing_else = not layer.args and set(layer.keywords) == set(LayerParts._fields)
    return LayerParts(**layer.keywords) if nothing_else else None


def check_dispatcher(name: str, dispatcher: Any) -> None:
    """Refuse what is no dispatcher: a function that returns one, or its plan.

    Args:
        name: of the function, for the message.
        dispatcher: as ``dropless()``.

    Raises:
        ValueError: if it is no ``Dispatcher``.

    Example:
        >>> check_dispatcher("a layer", "dropless")
        Traceback (most recent call last):
        ValueError: a layer: dispatcher = 'dropless'; expected a Dispatcher, such as dropless() or \
padded(capacity_factor=1.25): its value, with the brackets.
    """
    if not isinstance(dispatcher, Dispatcher):
        raise ValueError(
            f"{name}: dispatcher = {dispatcher!r}; expected a Dispatcher, such as dropless() or "
            f"padded(capacity_factor=1.25): its value, with the brackets."
        )


def _expert_layer(x: Tensor, routing: Routing, params: Any, *, dispatcher: Dispatcher, experts: Experts) -> Tensor:
    plan = dispatcher.plan(routing)
    rows = dispatcher.dispatch(x, routing, plan)  # (R, D)
    rows = experts(rows, plan.groups, params)  # (R, D)
    return dispatcher.combine(rows, routing, plan)  # (T, D)


def limited(layer: ExpertLayer, *, plan: Callable[[Routing], DispatchPlan]) -> ExpertLayer:
    """Let an expert layer that drops nothing leave out what a plan drops, so that it keeps to a capacity limit.

    Of the plan it takes what is dropped, and nothing else: rows are ordered and padded as the layer does it. As causal,
    synchronising and deterministic as the two are.

    Args:
        layer: a dropless one, as ``fused_layer()``.
        plan: routing -> DispatchPlan, as ``padded(...).plan``.

    Returns:
        A function (x (T, D), routing, params) -> (T, D).

    Raises:
        ValueError: if ``layer`` or ``plan`` cannot be called, as a ``Dispatcher`` in place of its plan.

    Example:
        >>> from moekit.dispatch import padded
        >>> from moekit.experts import fused_layer
        >>> from moekit.recipes import mixtral
        >>> plan = padded(capacity_factor=1.25).plan
        >>> recipe = mixtral()._replace(layer=limited(fused_layer(), plan=plan), plan=plan)

    References:
        Lepikhin et al., GShard, 2020, section 2.2 (expert capacity), https://arxiv.org/abs/2006.16668
    """
    if not callable(layer):
        raise ValueError(
            f"limited: layer = {reprlib.repr(layer)}; expected a function (x, routing, params) -> y, such as "
            f"fused_layer()."
        )
    check_plan("limited", plan)
    return partial(_limited, layer=layer, plan=plan)


def _limited(
    x: Tensor, routing: Routing, params: Any, *, layer: ExpertLayer, plan: Callable[[Routing], DispatchPlan]
) -> Tensor:
    return layer(x, without_dropped(routing, plan(routing)), params)


def recompute(layer: ExpertLayer) -> ExpertLayer:
    """Let an expert layer keep nothing for its backward but tokens, routing and parameters, and compute the rest again.

    The routing is an argument, so the decision is kept: it is made once, and cannot turn out otherwise the second time.

    Args:
        layer: to wrap; a plan that draws random numbers draws the same again.

    Returns:
        The same function, which holds less memory between forward and backward and takes one more forward.

    Example:
        >>> from moekit.recipes import mixtral
        >>> recipe = mixtral()
        >>> saving = recipe._replace(layer=recompute(recipe.layer))

    References:
        Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016, https://arxiv.org/abs/1604.06174
    """
    return partial(_recompute, layer=layer)


def _recompute(x: Tensor, routing: Routing, params: Any, *, layer: ExpertLayer) -> Tensor:
    y: Tensor = checkpoint(layer, x, routing, params, use_reentrant=False)
    return y
