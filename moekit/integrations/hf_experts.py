"""The experts of a Hugging Face model on moekit's dispatchers and grouped matmuls, with the weights where they are.

An experts module of transformers (``transformers.integrations.moe.use_experts_implementation``) holds three-axis
parameters and says by attributes how they are laid out. Its forward takes hidden states, the experts that each token
chose and their weights; ``experts_forward`` is that forward.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moekit.autocast import autocast_dtype
from moekit.dispatch import dropless
from moekit.experts import Activation, grouped
from moekit.experts.biased import affine
from moekit.integrations.hf_activations import activation_of
from moekit.recipes import expert_layer
from moekit.types import Dispatcher, ExpertLayer, GroupedMatmul, Groups, Routing

_PROJECTIONS = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}


class ModuleParams(NamedTuple):
    """What an experts module computes with, in moekit's layout: views, no copies.

    Attributes:
        up: (E, D, 2F), gate and up side by side or interleaved as ``activation`` expects them; (E, D, F) without gate.
        up_bias: (E, 2F), (E, F) or None.
        down: (E, F, D).
        down_bias: (E, D) or None.
        activation: (R, 2F) or (R, F) -> (R, F), row by row.
        norm: (R, D) -> (R, D), row by row, on the experts' outputs; or None.
        has_own_parameters: whether ``activation`` or ``norm`` learns anything, so that rows which belong to no expert
            must be kept out of its gradient.
        known: what ``activation`` is among those of ``fused_layer``; None for any other.

    Example:
        >>> from transformers.models.mixtral import modeling_mixtral as mixtral
        >>> config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4)
        >>> params = module_params(mixtral.MixtralExperts(config))
        >>> params.down.shape, params.known.function, params.has_own_parameters
        (torch.Size([4, 12, 8]), 'silu', False)
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]
    norm: Callable[[Tensor], Tensor] | None
    has_own_parameters: bool
    known: Activation | None = None


def experts_modules(name: str, model: nn.Module) -> dict[str, nn.Module]:
    """List the experts modules of a model.

    Args:
        name: of the caller, for the message.
        model: any module.

    Returns:
        Name to module.

    Raises:
        ValueError: if it has none.

    Example:
        >>> experts_modules("a function", nn.Linear(2, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: a function: Linear has no experts modules with transformers' experts interface; ...
    """
    marks = ("has_gate", "is_transposed", "down_proj")
    found = {each: m for each, m in model.named_modules() if all(hasattr(m, mark) for mark in marks)}
    if not found:
        raise ValueError(
            f"{name}: {type(model).__name__} has no experts modules with transformers' experts interface; expected a "
            f"Mixture-of-Experts model whose experts class carries @use_experts_implementation."
        )
    return found


def module_params(experts: nn.Module) -> ModuleParams:
    """Read the parameters of a transformers experts module: any of its layouts, biased or not, gated or not.

    Args:
        experts: a module whose class carries transformers' ``use_experts_implementation``.

    Returns:
        ModuleParams; the weights are views, transposed where the module stores (E, out, in).

    Raises:
        TypeError: if the module does not carry the interface.

    Example:
        >>> from transformers.models.mixtral import modeling_mixtral as mixtral
        >>> config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4)
        >>> module_params(mixtral.MixtralExperts(config)).up.shape
        torch.Size([4, 8, 24])
    """
    module: Any = experts
    lacking = [n for n in ("is_transposed", "has_bias", "has_gate", "has_post_expert_norm") if not hasattr(module, n)]
    if lacking:
        raise TypeError(
            f"{type(experts).__name__} is no experts module of transformers: it lacks {', '.join(lacking)}. Expected a "
            f"class under transformers' @use_experts_implementation."
        )
    name = "gate_up_proj" if module.has_gate else "up_proj"
    return ModuleParams(
        up=_as_in_out(getattr(module, name), module.is_transposed),
        up_bias=getattr(module, f"{name}_bias") if module.has_bias else None,
        down=_as_in_out(module.down_proj, module.is_transposed),
        down_bias=module.down_proj_bias if module.has_bias else None,
        activation=module._apply_gate if module.has_gate else module.act_fn,
        norm=module.post_expert_norm if module.has_post_expert_norm else None,
        has_own_parameters=any(parameter not in _PROJECTIONS for parameter, _ in experts.named_parameters()),
        known=activation_of(experts),
    )


def routing_of(top_k_index: Tensor, top_k_weights: Tensor, *, num_experts: int) -> Routing:
    """Turn transformers' two tensors into a routing.

    Causal, as the choice that it is given. No host synchronisation. Deterministic on CUDA.

    Args:
        top_k_index: (T, K) integers in [0, E). Anything else, as the E that transformers' expert parallelism writes for
            the experts of other ranks, stands for a choice that does not exist here.
        top_k_weights: (T, K), any floating dtype.
        num_experts: E.

    Returns:
        Routing of shape (T, K), weights in float32 (float64 stays), zero and -1 where a choice does not exist.

    Raises:
        ValueError: if the two are not of one shape (T, K).

    Example:
        >>> routing_of(torch.tensor([[1, 4]]), torch.ones(1, 2), num_experts=4)[1:3]
        (tensor([[ 1, -1]]), tensor([[1., 0.]]))
    """
    if top_k_index.ndim != 2 or top_k_index.shape != top_k_weights.shape:
        raise ValueError(
            f"routing_of: top_k_index has shape {tuple(top_k_index.shape)} and top_k_weights "
            f"{tuple(top_k_weights.shape)}; expected (T, K) for both. Flatten batch and sequence into one token axis."
        )
    missing = (top_k_index < 0) | (top_k_index >= num_experts)
    tokens = torch.arange(top_k_index.shape[0], device=top_k_index.device).unsqueeze(-1)
    return Routing(
        token_indices=tokens.expand_as(top_k_index),
        expert_indices=top_k_index.long().masked_fill(missing, -1),
        weights=top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32)).masked_fill(missing, 0.0),
        num_tokens=top_k_index.shape[0],
        num_experts=num_experts,
        pool=top_k_index.numel(),
    )


def module_ffn(rows: Tensor, groups: Groups, params: ModuleParams, *, matmul: GroupedMatmul) -> Tensor:
    """Apply the feed-forward networks of an experts module: norm(activation(x W_up + b_up) W_down + b_down).

    No host synchronisation beyond the backend's. Deterministic on CUDA if the backend is.

    Args:
        rows: (R, D).
        groups: of E groups.
        params: of E experts.
        matmul: the backend.

    Returns:
        (R, D); rows past the last group are undefined.

    Example:
        >>> from moekit.experts import loop
        >>> params = ModuleParams(torch.ones(2, 3, 4), None, torch.ones(2, 4, 3), None, torch.relu, None, False)
        >>> module_ffn(torch.ones(5, 3), Groups(torch.tensor([2, 3]), None), params, matmul=loop)[0]
        tensor([12., 12., 12.])
    """
    hidden = _affine(rows, groups, params.up, params.up_bias, matmul=matmul)  # (R, 2F) or (R, F)
    if not params.has_own_parameters:
        hidden = params.activation(hidden)
    else:  # on both sides, since the gradient of a row past the last group is as undefined as its value
        hidden = _without_tail(params.activation(_without_tail(hidden, groups)), groups)
    out = _affine(hidden, groups, params.down, params.down_bias, matmul=matmul)  # (R, D)
    return out if params.norm is None else params.norm(_without_tail(out, groups))


def module_layer(*, matmul: GroupedMatmul = grouped, dispatcher: Dispatcher = dropless()) -> ExpertLayer:  # noqa: B008, an immutable tuple
    """Compose the expert layer that runs a transformers experts module.

    Args:
        matmul: the backend.
        dispatcher: ``dropless()`` computes what the model does; ``padded(capacity_factor=...)`` drops.

    Returns:
        A function (x (T, D), routing, ModuleParams) -> (T, D).

    Example:
        >>> from moekit.dispatch import padded
        >>> from moekit.experts import batched
        >>> layer = module_layer(matmul=batched, dispatcher=padded(capacity_factor=2.0))
    """
    return expert_layer(dispatcher=dispatcher, experts=partial(module_ffn, matmul=matmul))


def experts_forward(
    experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, layer: ExpertLayer
) -> Tensor:
    """Run a transformers experts module on a moekit layer: the forward that ``register`` hands to transformers.

    Sums over a token's experts are taken in float32 (float64 for float64). No host synchronisation beyond the layer's.

    Args:
        experts: the module.
        hidden_states: (T, D).
        top_k_index: (T, K), see ``routing_of``.
        top_k_weights: (T, K), the combine weights.
        layer: an expert layer over ``ModuleParams``, as from ``module_layer``.

    Returns:
        (T, D), the dtype of ``hidden_states``.

    Raises:
        TypeError: if the module does not carry the interface.
        ValueError: if the shapes do not fit.

    Example:
        >>> from transformers.models.mixtral import modeling_mixtral as mixtral
        >>> config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4)
        >>> x, index, weights = torch.ones(5, 8), torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 2)
        >>> experts_forward(mixtral.MixtralExperts(config), x, index, weights, layer=module_layer()).shape
        torch.Size([5, 8])
    """
    params = module_params(experts)
    routing = routing_of(top_k_index, top_k_weights, num_experts=params.up.shape[0])
    return layer(hidden_states, routing, params).to(hidden_states.dtype)


def _as_in_out(w: Tensor, is_transposed: bool) -> Tensor:
    return w if is_transposed else w.transpose(1, 2)


def _affine(rows: Tensor, groups: Groups, w: Tensor, bias: Tensor | None, *, matmul: GroupedMatmul) -> Tensor:
    rows = as_weights(rows, w)
    return matmul(rows, groups, w) if bias is None else affine(rows, groups, (w, bias.unsqueeze(1)), matmul=matmul)


def as_weights(rows: Tensor, w: Tensor) -> Tensor:
    """Cast rows to the dtype of weights, but inside autocast, which casts both by itself.

    Norms and activations in float32 hand float32 rows to narrower weights.

    Args:
        rows: (R, D).
        w: that they are multiplied by.

    Returns:
        (R, D).

    Example:
        >>> as_weights(torch.ones(2, 3), torch.ones(1, 3, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    return rows if autocast_dtype(rows.device.type) is not None else rows.to(w.dtype)


def _without_tail(rows: Tensor, groups: Groups) -> Tensor:
    numbers = torch.arange(rows.shape[0], device=rows.device)
    return rows.masked_fill((numbers >= groups.sizes.sum()).unsqueeze(1), 0.0)
