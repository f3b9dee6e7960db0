"""A whole expert layer as a few kernels: tokens are copied to rows, multiplied twice, and summed by their weights.

The activation is taken where the first product is added up: of hidden units its results are written and, only if they
are to be kept, pre-activations. Between forward and backward it keeps what its argument ``keep`` says; nothing else of
N rows lives that long.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from moekit.autocast import in_autocast
from moekit.experts._fused_operators import Fused, FusedOnce, Layout, Settings
from moekit.experts._memory_order import is_transposed
from moekit.experts.activations import SWIGLU, Activation
from moekit.experts.biased import BiasedGatedParams, BiasedMlpParams
from moekit.experts.checks import (
    check_activation,
    check_chooser,
    check_keep,
    check_kernel_dtypes,
    check_precision,
)
from moekit.experts.ffns import GatedParams, MlpParams
from moekit.experts.keep import INPUTS, PREACTIVATION, Keep
from moekit.experts.packed import PackedGatedParams
from moekit.experts.param_checks import check_params
from moekit.experts.tile_files import layer_tiles
from moekit.experts.tiles import LayerSize, LayerTiles, capability_of, check_tiles, is_narrow
from moekit.operators import is_transformed, refuse_tangents, wants_gradient
from moekit.types import ExpertLayer, Routing, existing_at_most

_GATED = (GatedParams, BiasedGatedParams, PackedGatedParams)
_PLAIN = (MlpParams, BiasedMlpParams)


def fused_layer(
    *,
    activation: Activation = SWIGLU,
    keep: Keep = PREACTIVATION,
    precision: str = "ieee",
    tiles: Callable[[LayerSize], LayerTiles] = layer_tiles,
) -> ExpertLayer:
    """Return a dropless expert layer out of Triton kernels, forward and backward.

    It computes what ``expert_layer(dispatcher=dropless(), experts=partial(swiglu, matmul=loop))`` does: up-projections
    with biases and activation in their epilogue, down-projection, and one kernel that sums each token's rows, weighted.
    In the backward, the gradient of a router weight is an inner product: <a, dy W_down^T>, and with biases + <dy, b>.

    Matrices are read as they lie in memory, (E, D, F) or a view of (E, F, D), also where gate and up are views of one
    tensor, and gradients come back in that order, those of ``PackedGatedParams`` packed. In 16 bits no matrix is
    copied. In float32 they are where experts have many rows, for as long as a product runs: exact products copy
    matrices that they read transposed, from 16 rows an expert on, and TF32 products the others, from 128 on, forward
    or backward; gradients of matrices by TF32 read transposed copies of rows on cards with descriptors (9.0 and later).
    Matrices of any other strides, as interleaved columns, are copied in each call; so are those of gate and up if their
    strides differ.

    Experts none of whose parameters wants a gradient are frozen: the backward does without their gradients, half of
    its arithmetic. The layer's gradient has no gradient, and says so if that is asked for.

    Causal if the routing is. No host synchronisation. Deterministic on CUDA: a token's rows are added in the order of
    its assignments, for which routings that are no (T, K) are sorted by token. On the CPU it runs only in Triton's
    interpreter, which multiplies bfloat16 wrongly, so there that is refused.

    Args:
        activation: what experts do. Gated ones take ``GatedParams``, ``BiasedGatedParams`` or ``PackedGatedParams``,
            the others ``MlpParams`` or ``BiasedMlpParams``.
        keep: what lives from the forward to the backward. Where gradients are off, or nothing wants one, it is nothing,
            and pre-activations are not even written.
        precision: of float32 products, "ieee" or "tf32".
        tiles: chooses the kernels' tiles by the size of the layer.

    Returns:
        A function (x (T, D), routing, params) -> (T, D), of float32, bfloat16 or float16; sums are taken in float32.

    Raises:
        ValueError: if ``precision`` is neither, ``keep`` is no ``Keep``, ``tiles`` is no function, or the kernels do
            not know the activation; from the layer, if ``params`` do not fit the activation, the parts of the routing
            each other, or shapes, devices and dtypes each other; if tensors are float64, or bfloat16 in Triton's
            interpreter; or if there are more experts than the device's shared memory has counts for: 32,767 where that
            is 128 KiB or more, 16,383 where it is less.
        NotImplementedError: from the layer, if a tensor has a tangent, for a gradient in forward mode, or inside
            ``torch.vmap``.

    Example:
        >>> from moekit.experts import GEGLU
        >>> layer = fused_layer(activation=GEGLU, keep=INPUTS)
        >>> layer.keywords["keep"]
        Keep(rows=False, preactivation=False)

    References:
        Guo et al., SonicMoE, 2025 (the router's gradient from the down-projection's backward; what is kept),
            https://arxiv.org/abs/2512.14080
        OpenAI, gpt-oss, ``gpt_oss/torch/model.py`` (the clamped activation), https://github.com/openai/gpt-oss
        Tan et al., Scattered Mixture-of-Experts Implementation, 2024, https://arxiv.org/abs/2403.08245
    """
    check_precision("fused_layer", precision)
    check_activation("fused_layer", activation)
    check_keep("fused_layer", keep)
    check_chooser("fused_layer", tiles)
    return partial(_fused_layer, activation=activation, keep=keep, precision=precision, tiles=tiles)


def _fused_layer(
    x: Tensor,
    routing: Routing,
    params: Any,
    *,
    activation: Activation,
    keep: Keep,
    precision: str,
    tiles: Callable[[LayerSize], LayerTiles],
) -> Tensor:
    check_params("fused_layer", x, routing, params, activation, _GATED if activation.gated else _PLAIN)
    parameters, layout = _in_memory(params)
    x, *parameters = in_autocast(x, *parameters)
    check_kernel_dtypes("fused_layer", x, *parameters)
    experts, tokens, weights = routing.expert_indices, routing.token_indices, routing.weights
    if experts.ndim != 2:
        experts, tokens, weights = experts.flatten(), tokens.flatten(), weights.flatten()
    hidden = params.down.shape[2 if layout.packed else 1]
    most = existing_at_most(routing)
    size = LayerSize(
        x.dtype, most, routing.num_experts, x.shape[1], hidden, activation.gated,
        capability_of(x.device), is_narrow(x.device), precision,
    )  # fmt: skip
    chosen = tiles(size)
    write = _text if torch.compiler.is_compiling() else _text_once
    settings = write(chosen, layout, activation.function, activation.gated, precision)
    kept = keep if wants_gradient(x, weights, *parameters) else INPUTS
    given = (
        settings, [activation.alpha, activation.limit], *kept, chosen.up.m, chosen.grad_up.k, max(most, 1),
        x, weights.to(torch.float32), experts, tokens, *parameters,
    )  # fmt: skip
    if not is_transformed():
        return Fused.apply(*given)
    refuse_tangents("fused_layer", x, weights, *parameters)
    return FusedOnce.apply(*given)[0]


def _text(tiles: LayerTiles, layout: Layout, function: str, gated: bool, precision: str) -> str:
    return Settings(function, gated, precision, layout, check_tiles(tiles)).text()


_text_once = lru_cache(maxsize=512)(_text)


def _in_memory(params: Any) -> tuple[list[Tensor], Layout]:
    """View parameters in their order of memory, and say which that is."""
    packed, biased = isinstance(params, PackedGatedParams), isinstance(params, BiasedGatedParams | BiasedMlpParams)
    matrices, biases = (params[: len(params) // 2], params[len(params) // 2 :]) if biased else (params, ())
    *ups, down = (p.transpose(1, 2) for p in matrices) if packed else matrices  # (E, D, .) and (E, F, D)
    layout = Layout(packed, biased, all(map(is_transposed, ups)), is_transposed(down))
    ups = [p.transpose(1, 2) for p in ups] if layout.up_transposed else ups
    down = down.transpose(1, 2) if layout.down_transposed else down
    return [*ups, down, *biases], layout
