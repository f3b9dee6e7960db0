"""The glue: a recipe is a method as a value, and ``moe_layer`` applies it."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.checks import check_shape, check_token_mask
from moekit.dispatch import dropless_plan, mix_tokens, slot_routing, spread_slots
from moekit.experts import init_gated
from moekit.routing import clean, init_linear_gate, mask_soft, mask_tokens, score_and_pass, without_simple
from moekit.routing.gates import check_precision
from moekit.types import (
    DispatchPlan,
    ExpertLayer,
    Experts,
    Gate,
    Groups,
    LayerOutput,
    Loss,
    Router,
    RouterState,
    Routing,
    SharedExperts,
    SimpleExperts,
    SoftRouting,
)


class MoEParams(NamedTuple):
    """The learnable tensors of one MoE layer.

    Attributes:
        gate: what the gate takes: (D, E), or a NamedTuple of tensors.
        experts: a NamedTuple of (E, ., .) tensors.
        shared: the same for the shared experts, or None.
        shared_gate: (D, 1), which weighs the shared experts token by token, or None.
        simple: a NamedTuple of tensors for the simple experts, or None.

    Example:
        >>> params = MoEParams(init_linear_gate(8, 4), init_gated(4, 8, 16))
        >>> params.gate.shape, params.experts.up.shape, params.shared
        (torch.Size([8, 4]), torch.Size([4, 8, 16]), None)
    """

    gate: Any
    experts: Any
    shared: Any = None
    shared_gate: Tensor | None = None
    simple: Any = None


class Recipe(NamedTuple):
    """An MoE method as a value: change one part with ``_replace`` and you have an ablation.

    Attributes:
        gate: x, params -> logits.
        route: logits -> Routing or SoftRouting. It is called with ``bias=`` and with what ``needs`` lists.
        layer: the expert layer, from ``expert_layer`` or wrapped in a parallel strategy.
        losses: name to balancing loss. They are returned as they are; ``coefficients`` says how to add them up.
        coefficients: name of a loss to its weight in the total.
        init: (num_experts, dim, hidden or None, generator=, device=, dtype=) -> expert parameters. ``hidden`` is None
            where nobody gave a width, and a multiple of it for shared experts. One that fixes the width takes what is
            given all the same: ``lambda e, dim, hidden=None, **kw: init_gated(e, dim, hidden or 48, **kw)``.
        plan: the plan that ``layer`` makes. The causality audit, drop rates and exchanges go by it, so who
            replaces the dispatcher of ``layer`` replaces it too, by ``dispatcher.plan``.
        shared: experts that see every token, with weight one; or None.
        simple: experts that are no feed-forward networks; or None.
        state: what the router remembers between optimizer steps; or None.
        needs: what the router wants beside logits and bias, of {"token_ids", "token_mask",
            "sequence_length"} and the state's name.
        causal: whether a token's output is independent of later tokens.
        init_gate: (dim, num_experts, generator=, device=, dtype=) -> the gate's parameters.

    Example:
        >>> from functools import partial
        >>> from moekit.recipes import mixtral
        >>> from moekit.routing import sigmoid, top_k
        >>> recipe = mixtral()._replace(route=partial(top_k, k=4, score=sigmoid))
        >>> recipe.causal, recipe.coefficients
        (True, {'load_balance': 0.02})
    """

    gate: Gate
    route: Router
    layer: ExpertLayer
    losses: Mapping[str, Loss] = {}
    coefficients: Mapping[str, float] = {}
    init: Callable[..., Any] = init_gated
    plan: Callable[[Routing], DispatchPlan] = dropless_plan
    shared: SharedExperts | None = None
    simple: SimpleExperts | None = None
    state: RouterState | None = None
    needs: tuple[str, ...] = ()
    causal: bool = True
    init_gate: Callable[..., Any] = init_linear_gate

    def __deepcopy__(self, memo: dict[int, Any]) -> "Recipe":
        """Return itself: it is a value, and one that is spread over ranks holds their groups, which nobody can copy."""
        return self


def moe_layer(
    x: Tensor,
    params: MoEParams,
    recipe: Recipe,
    *,
    layer: ExpertLayer | None = None,
    state: Tensor | None = None,
    token_ids: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> LayerOutput:
    """Apply an MoE layer: gate, route, experts, and the balancing losses.

    Args:
        x: (..., D). The axis before D is the sequence.
        params: of gate, experts, shared and simple experts.
        recipe: the method.
        layer: to run in place of the recipe's own; it may have parameters of its own.
        state: what the router remembers, a must if there is a ``recipe.state``; else an (E,) selection bias, or None.
        token_ids: (...) int64 vocabulary ids, for routers that list them in ``recipe.needs``.
        token_mask: (...) bool, True for real tokens. Others reach no routed expert, take nobody's place and count in no
            loss; they do count in T of a capacity limit, and a router or gate that draws numbers draws for them too.

    Returns:
        LayerOutput: y (..., D), the routing of the T flattened tokens, the losses and the logits (T, E).

    Raises:
        ValueError: if the router needs something that was not given, a shape does not fit, the gate's logits are in
            half precision, or the recipe's shared experts or their gate have no parameters, or its gate too many.
        TypeError: if ``token_mask`` is not bool, or recipe or parameters are none.

    Example:
        >>> from moekit.experts import init_gated
        >>> from moekit.recipes import mixtral
        >>> params = MoEParams(torch.zeros(4, 8), init_gated(8, 4))
        >>> output = moe_layer(torch.ones(2, 3, 4), params, mixtral(k=2))
        >>> output.y.shape, {name: round(loss.item(), 3) for name, loss in output.losses.items()}
        (torch.Size([2, 3, 4]), {'load_balance': 1.0})
    """
    _check_given(x, params, recipe, state=state, token_ids=token_ids, token_mask=token_mask)
    tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])  # (T, D); a view takes autograd's time
    length = max(x.shape[-2] if x.ndim > 2 else tokens.shape[0], 1)
    logits, tokens = score_and_pass(recipe.gate, tokens, params.gate)  # (T, E)
    check_precision("moe_layer", clean(logits))
    remembered = "bias" if recipe.state is None else recipe.state.name
    ids, mask = (None if each is None else each.reshape(-1) for each in (token_ids, token_mask))  # (T,)
    given: dict[str, Any] = {"token_ids": ids, "sequence_length": length, "token_mask": mask, remembered: state}
    routing = recipe.route(logits, bias=given.get("bias"), **_wanted(recipe.needs, given))
    if mask is not None:
        routing = mask_soft(routing, mask) if isinstance(routing, SoftRouting) else mask_tokens(routing, mask)
    y, routing = _routed_experts(tokens, routing, params, recipe, layer, mask)  # (T, D)
    if y.shape != tokens.shape:
        raise ValueError(
            f"the expert layer returned {tuple(y.shape)}; expected {tuple(tokens.shape)}, as the tokens are. Let the "
            f"expert network map D to D, and combine return a row for each token."
        )
    if recipe.shared is not None:
        _check_shared(recipe.shared, params)
        y = y + shared_experts(tokens, params.shared, experts=recipe.shared.network, gate=params.shared_gate)
    options: dict[str, Any] = {"token_mask": mask, "sequence_length": length}
    losses = {name: loss(logits, routing, **options) for name, loss in recipe.losses.items()}
    return LayerOutput(y if x.ndim == 2 else y.reshape(x.shape), routing, losses, logits)


_EACH = "one for each token of x"


def _check_given(
    x: Tensor,
    params: MoEParams,
    recipe: Recipe,
    *,
    state: Tensor | None,
    token_ids: Tensor | None,
    token_mask: Tensor | None,
) -> None:
    check_recipe("moe_layer", recipe)
    if not isinstance(params, MoEParams):
        raise TypeError(
            f"moe_layer: params are a {type(params).__name__}; expected MoEParams, as MoEParams(gate, experts)."
        )
    if token_ids is not None:
        check_shape("token_ids", token_ids, x.shape[:-1], _EACH)
    if token_mask is not None:
        check_token_mask(token_mask, x.shape[:-1], _EACH)
    check_shared("moe_layer", recipe.shared)
    if recipe.state is not None and state is None:
        raise ValueError(
            f"the recipe's router remembers {recipe.state.name!r} between steps, and no state is given; hand on state= "
            "(MoE.state of a trained layer, recipe.state.init(E) to begin with), or take "
            "recipe._replace(state=None)."
        )


def _check_shared(shared: SharedExperts, params: MoEParams) -> None:
    gate = params.shared_gate
    if params.shared is None:
        raise ValueError(
            "the recipe has shared experts, and the parameters none. Give the recipe the parameters that were made for "
            "it, by a new MoE of this recipe, or take recipe._replace(shared=None)."
        )
    if shared.gated == (gate is None):
        raise ValueError(
            f"the recipe's shared experts have gated={shared.gated}, and the parameters {'no' if gate is None else 'a'}"
            " shared_gate, which weighs them token by token. Give the recipe the parameters that were made for it, or "
            f"take recipe._replace(shared=recipe.shared._replace(gated={not shared.gated}))."
        )


def check_recipe(name: str, recipe: Any) -> None:
    """Refuse what is no recipe, such as the function that makes one.

    Args:
        name: of the function, for the message.
        recipe: the method.

    Raises:
        TypeError: if it is none.

    Example:
        >>> check_recipe("a layer", 3)
        Traceback (most recent call last):
        TypeError: a layer: recipe = 3; expected a Recipe. A method is called: mixtral(), not mixtral.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"{name}: recipe = {recipe!r}; expected a Recipe. A method is called: mixtral(), not mixtral.")


def check_shared(name: str, shared: Any) -> None:
    """Refuse what says of no shared experts how many there are, as a network alone.

    Args:
        name: of the function, for the message.
        shared: of a recipe.

    Raises:
        ValueError: if it is neither None nor ``SharedExperts`` of one or more.

    Example:
        >>> check_shared("a layer", 2)
        Traceback (most recent call last):
        ValueError: a layer: the recipe's shared experts are 2; expected None, or SharedExperts(network, number) with \
a positive number.
    """
    if shared is not None and not (isinstance(shared, SharedExperts) and shared.number > 0):
        raise ValueError(
            f"{name}: the recipe's shared experts are {reprlib.repr(shared)}; expected None, or SharedExperts(network, "
            f"number) with a positive number."
        )


def _routed_experts(
    x: Tensor,
    routing: Routing | SoftRouting,
    params: MoEParams,
    recipe: Recipe,
    layer: ExpertLayer | None,
    token_mask: Tensor | None,
) -> tuple[Tensor, Routing]:
    """Return y (T, D), and the routing that statistics and losses are about."""
    run = recipe.layer if layer is None else layer
    if isinstance(routing, SoftRouting):
        of_slots = slot_routing(routing, token_mask=token_mask)
        slots = mix_tokens(x, routing, token_mask=token_mask)
        return spread_slots(run(slots, of_slots, params.experts), routing), of_slots
    of_networks = routing_of_networks(routing, recipe)
    y = run(x, of_networks, params.experts)
    if recipe.simple is not None:
        y = y + recipe.simple.apply(x, routing, params.simple, num_experts=of_networks.num_experts).to(y.dtype)
    return y, routing


def routing_of_networks(routing: Routing, recipe: Recipe) -> Routing:
    """Return what of a routing the feed-forward networks have to do: all of it, unless a recipe has simple experts.

    Args:
        routing: the decision over all experts.
        recipe: of the layer.

    Returns:
        The routing that ``recipe.layer`` and ``recipe.plan`` take.

    Example:
        >>> from moekit.recipes import mixtral
        >>> from moekit.routing import round_robin
        >>> routing_of_networks(round_robin(torch.zeros(4, 8), k=2), mixtral()).num_experts
        8
    """
    if recipe.simple is None:
        return routing
    return without_simple(routing, num_experts=routing.num_experts - recipe.simple.number)


def shared_experts(x: Tensor, params: Any, *, experts: Experts, gate: Tensor | None = None) -> Tensor:
    """Apply experts that see every token, and add up their outputs.

    S shared experts of width F are computed as one expert of width S * F, which is the same function.

    Args:
        x: (T, D).
        params: a NamedTuple of (1, ., .) tensors.
        experts: the feed-forward network.
        gate: (D, 1), to weigh the sum of each token by sigmoid(x W), as Qwen2's; None weighs nothing.

    Returns:
        (T, D).

    Example:
        >>> from functools import partial
        >>> from moekit.experts import grouped, init_gated, swiglu
        >>> shared_experts(torch.ones(5, 4), init_gated(1, 4, 16), experts=partial(swiglu, matmul=grouped)).shape
        torch.Size([5, 4])

    References:
        Dai et al., DeepSeekMoE, 2024, section 3.2, https://arxiv.org/abs/2401.06066
    """
    y = experts(x, _one_group(x), params)
    return y if gate is None else torch.sigmoid(x @ gate.to(x.dtype)) * y


def weighted_sum(losses: Mapping[str, Tensor], coefficients: Mapping[str, float | Tensor]) -> Tensor | float:
    """Add losses up with their coefficients; a loss without a coefficient is only reported.

    Args:
        losses: name to scalar.
        coefficients: name to weight, a number or a scalar.

    Returns:
        Scalar; 0.0 if there is nothing to add.

    Raises:
        ValueError: if a coefficient names no loss, or one that is more than one number.

    Example:
        >>> weighted_sum({"load_balance": torch.tensor(2.0)}, {"load_balance": 0.5})
        tensor(1.)
    """
    unknown = set(coefficients) - set(losses)
    if unknown:
        raise ValueError(
            f"coefficients name {sorted(unknown)}, but the losses are {sorted(losses)}; expected a subset."
        )
    for name in coefficients:
        if isinstance(losses[name], Tensor) and losses[name].numel() != 1:
            raise ValueError(
                f"the loss {name!r} has shape {tuple(losses[name].shape)}; expected a scalar. Take its mean or sum."
            )
    return sum((weight * losses[name] for name, weight in coefficients.items()), 0.0)


def check_needs(needs: Any, known: Iterable[str]) -> None:
    """Refuse names of what routers want that no layer knows.

    Args:
        needs: of a recipe.
        known: names of what a layer can hand on.

    Raises:
        ValueError: if it is no tuple of such names.

    Example:
        >>> check_needs(("token_ids",), ["token_ids", "token_mask"])
    """
    if isinstance(needs, str):
        raise ValueError(f"recipe.needs = {needs!r}; expected a tuple of names: ({needs!r},).")
    for name in needs:
        if name not in known:
            raise ValueError(
                f"recipe.needs names {name!r}, which no layer knows; known: {', '.join(sorted(known))}. Of a state the "
                f"name counts: recipe.state.name."
            )


def _wanted(needs: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {}
    for name in needs:
        value = given.get(name)
        if value is None and name != "token_mask":  # None masks nothing
            check_needs(needs, given)
            raise ValueError(f"this recipe's router needs {name!r}, which was not given; pass {name}= to the layer.")
        wanted[name] = value
    return wanted


def _one_group(x: Tensor) -> Groups:
    return Groups(torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device), capacity=x.shape[0])
