"""The choice of an expert layer for a device and a dtype, and why: from what is known, without timing anything."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.autocast import dtype_in_products
from moekit.dispatch import dropless, gather_rows, padded_plan, scatter_rows
from moekit.experts import (
    CLAMPED_SWIGLU,
    SWIGLU,
    Activation,
    GatedParams,
    MlpParams,
    PackedGatedParams,
    batched,
    fused_cpu,
    fused_layer,
    grouped,
    loop,
    triton,
)
from moekit.experts.checks import KERNEL_DTYPES, check_activation, check_chooser, check_keep
from moekit.experts.keep import PREACTIVATION, Keep
from moekit.experts.param_checks import kind_of
from moekit.experts.tile_files import layer_tiles
from moekit.experts.tiles import LayerSize, LayerTiles, compute_capability
from moekit.operators import HAS_TRITON, constant_in_graphs
from moekit.recipes.expert_layers import check_dispatcher, expert_layer, limited
from moekit.recipes.expert_networks import experts_of
from moekit.recipes.wording import first_line
from moekit.routing import fused_top_k, noisy, softmax, top_k
from moekit.routing.fused_top_k import kernel_takes
from moekit.routing.top_k import Score
from moekit.types import Dispatcher, ExpertLayer, GroupedMatmul, Logits, Routing

_OLDEST = (8, 0)  # Ampere: the first GPUs with bfloat16 in Triton's products
_DROPPING = "without what the dispatcher's plan drops"
_CPU = "the CPU: computes expert by expert in the cache, a thread each, and keeps pre-activations alone"


class Choice(NamedTuple):
    """An expert layer, and why it was chosen.

    Attributes:
        name: of the backend.
        layer: (x (T, D), routing, params) -> (T, D).
        reason: what was decisive, in words.
    """

    name: str
    layer: ExpertLayer
    reason: str


def choose_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    dispatcher: Dispatcher | None = None,
    activation: Activation = SWIGLU,
    params: type[Any] | None = None,
    widths: tuple[int, int] | None = None,
    keep: Keep = PREACTIVATION,
    tiles: Callable[[LayerSize], LayerTiles] = layer_tiles,
) -> Choice:
    """Choose an expert layer for a device and a dtype, and say why.

    Reads what the device is and which packages there are; measures nothing, so that the same machine always makes the
    same choice. All layers that it can choose compute the same.

    Args:
        device: of tokens and parameters.
        dtype: that experts compute in; inside autocast, autocast's.
        dispatcher: of the layer; None is dropless.
        activation: of the experts.
        params: the type of their parameters, as ``BiasedGatedParams`` or ``PackedGatedParams``; None is that of experts
            without biases, ``GatedParams`` or ``MlpParams``.
        widths: (D, F), for a backend that asks for alignment; None takes them to be aligned.
        keep: what ``fused_layer`` keeps from the forward to the backward; the others keep what they do.
        tiles: chooses the tiles of ``fused_layer``'s kernels; ``from_table`` makes one of what `moekit tune` wrote.

    Returns:
        Choice.

    Raises:
        ValueError: if an argument is of another kind, whatever is chosen; if the kernels know no such activation, or
            moekit no expert network with such parameters; if a CUDA device cannot be used here.

    Example:
        >>> choice = choose_backend("cpu", torch.float32)
        >>> choice.name, choice.reason
        ('fused_cpu', 'the CPU: computes expert by expert in the cache, a thread each, and keeps pre-activations alone')
    """
    _check("choose_backend", dispatcher, activation, keep, tiles)
    experts_of(activation, params)  # which says what it expects
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"choose_backend: dtype = {dtype!r}; expected a torch.dtype, such as torch.bfloat16.")
    return _choose(
        torch.device(device), dtype, dispatcher=dropless() if dispatcher is None else dispatcher,
        activation=activation, params=params, widths=widths, keep=keep, tiles=tiles,
    )  # fmt: skip


def _check(
    name: str,
    dispatcher: Dispatcher | None,
    activation: Activation,
    keep: Keep,
    tiles: Callable[[LayerSize], LayerTiles],
) -> None:
    if dispatcher is not None:
        check_dispatcher(name, dispatcher)
    check_activation(name, activation)
    check_keep(name, keep)
    check_chooser(name, tiles)


def _choose(
    device: torch.device,
    dtype: torch.dtype,
    *,
    dispatcher: Dispatcher,
    activation: Activation,
    params: type[Any] | None,
    widths: tuple[int, int] | None,
    keep: Keep,
    tiles: Callable[[LayerSize], LayerTiles],
) -> Choice:
    """Choose as ``choose_backend`` does, of arguments that were checked; parameters are the layer's to check."""
    if device.type == "cpu":
        fused, unusable = "fused_cpu", why_not_fused_cpu(activation, params, dispatcher=dispatcher)
        if not unusable:
            return Choice(fused, fused_cpu(plan=dispatcher.plan, activation=activation), _CPU)
    else:
        fused, unusable = "fused_layer", why_not_fused(device, dtype, dispatcher=dispatcher)
        if not unusable:
            layer = fused_layer(activation=activation, keep=keep, precision=float32_products(), tiles=tiles)
            drops = _has_own_plan(dispatcher)
            what = f"activates inside the products, and keeps {_what_is_kept(keep)}"
            reason = f"{device.type} in {_word(dtype)}, {_DROPPING if drops else 'dropless'}, with Triton: {what}"
            return Choice(fused, limited(layer, plan=dispatcher.plan) if drops else layer, reason)
    name, matmul, reason = _matmul_for(device, dtype, dispatcher, widths)
    layer = expert_layer(dispatcher=dispatcher, experts=partial(experts_of(activation, params), matmul=matmul))
    return Choice(name, layer, f"{reason}; not {fused}: {unusable}")


def auto(
    *,
    dispatcher: Dispatcher | None = None,
    activation: Activation = SWIGLU,
    keep: Keep = PREACTIVATION,
    tiles: Callable[[LayerSize], LayerTiles] = layer_tiles,
) -> ExpertLayer:
    """Return an expert layer that chooses its backend when called: by the tokens' device and dtype, and the parameters.

    As causal, synchronising and deterministic as what it chooses: see ``choose_backend``.

    Args:
        dispatcher: of the layer; None is dropless.
        activation: of the experts.
        keep: what ``fused_layer`` keeps from the forward to the backward, where that is chosen; the others ignore it.
        tiles: chooses the tiles of ``fused_layer``'s kernels, where that is chosen.

    Returns:
        A function (x (T, D), routing, params) -> (T, D).

    Raises:
        ValueError: if an argument is of another kind, whatever would be chosen; from the layer, as ``choose_backend``,
            and as what it chooses.

    Example:
        >>> from moekit.experts import init_gated
        >>> from moekit.recipes import mixtral
        >>> recipe = mixtral()._replace(layer=auto())
        >>> recipe.layer(torch.ones(5, 4), recipe.route(torch.zeros(5, 3)), init_gated(3, 4, 8)).shape
        torch.Size([5, 4])
    """
    _check("auto", dispatcher, activation, keep, tiles)
    dispatcher = dropless() if dispatcher is None else dispatcher
    return partial(_auto, dispatcher=dispatcher, activation=activation, keep=keep, tiles=tiles)


def _auto(
    x: Tensor,
    routing: Routing,
    params: Any,
    *,
    dispatcher: Dispatcher,
    activation: Activation,
    keep: Keep,
    tiles: Callable[[LayerSize], LayerTiles],
) -> Tensor:
    kind = kind_of(params)
    if not hasattr(params, "down"):
        experts_of(activation, kind)  # which says what it expects
    hidden = params.down.shape[2 if kind is PackedGatedParams else 1]
    choice = _choose(
        x.device, dtype_in_products(x.dtype, x.device.type), dispatcher=dispatcher, activation=activation, params=kind,
        widths=(x.shape[1], hidden), keep=keep, tiles=tiles,
    )  # fmt: skip
    return choice.layer(x, routing, params)


def auto_top_k(
    logits: Logits,
    *,
    k: int,
    score: Score = softmax,
    normalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Routing:
    """Choose experts as ``top_k`` does, by the kernel of ``fused_top_k`` where ``fused_layer`` runs and it fits.

    As causal, synchronising and deterministic as those.

    Args:
        logits: (T, E), with or without noise.
        k: experts per token.
        score: of this package's; the kernel knows ``softmax`` and ``sigmoid``.
        normalize: divide a token's weights by their sum.
        scale: factor on the weights.
        bias: (E,) added to the scores for the selection only.

    Returns:
        Routing of shape (T, k).

    Raises:
        ValueError: as ``top_k``.

    Example:
        >>> auto_top_k(torch.tensor([[0.0, 2.0, 1.0]]), k=2).expert_indices
        tensor([[1, 2]])
    """
    logits = noisy(logits)
    fits = kernel_takes(logits.shape[-1], k, score)
    choose = top_k if not fits or why_not_fused(logits.device, torch.float32) else fused_top_k
    return choose(logits, k=k, score=score, normalize=normalize, scale=scale, bias=bias)


def why_not_fused(device: torch.device, dtype: torch.dtype, *, dispatcher: Dispatcher | None = None) -> str:
    """Say why ``fused_layer`` cannot run, by what is known of a device; "" if it can.

    Args:
        device: of tokens and parameters.
        dtype: that experts compute in.
        dispatcher: of the layer; None is dropless.

    Returns:
        A reason, or "".

    Raises:
        ValueError: if it is a CUDA device that torch cannot use here, so that nothing is known of it.

    Example:
        >>> why_not_fused(torch.device("cpu"), torch.float32)
        'its kernels are for CUDA devices, not cpu'
    """
    if device.type != "cuda":
        return f"its kernels are for CUDA devices, not {device.type}"
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA cards"
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    capability = _capability(device)
    if capability < _OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {_OLDEST[0]}.{_OLDEST[1]}"
    if dtype not in KERNEL_DTYPES:
        return f"its kernels do not compute in {_word(dtype)}"
    return "" if dispatcher is None else _why_not_moved(dispatcher)


def _why_not_moved(dispatcher: Dispatcher) -> str:
    """Say why a fused layer, which has the movement of rows in it, cannot take a dispatcher's place; "" if it can."""
    plain = dispatcher.dispatch is gather_rows and dispatcher.combine is scatter_rows
    return "" if plain else "it copies rows and adds them up by weight, and the dispatcher has ways of its own"


def _has_own_plan(dispatcher: Dispatcher) -> bool:
    """Say whether a dispatcher pads rows or drops some, for all that is known."""
    return dispatcher.plan is not dropless().plan


def _pads(dispatcher: Dispatcher) -> bool:
    """Say whether a dispatcher makes groups of equal size, which is known of ``padded``'s plan alone."""
    return isinstance(dispatcher.plan, partial) and dispatcher.plan.func is padded_plan


@constant_in_graphs
def _capability(device: torch.device) -> tuple[int, int]:
    try:
        return compute_capability(device)
    except (AssertionError, RuntimeError) as error:  # torch's, of one without CUDA, without a driver, or a wrong number
        raise ValueError(
            f"device = {device}, which torch cannot use here: {first_line(error)}. Give one that `moekit doctor` lists."
        ) from error


@constant_in_graphs
def float32_products() -> str:
    """Say what torch's own setting means for float32 products in kernels.

    Returns:
        "ieee", or "tf32" unless ``torch.get_float32_matmul_precision()`` is "highest"; in a compiled graph, as it was
        when the graph was made.

    Example:
        >>> float32_products()
        'ieee'
    """
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def why_not_fused_cpu(activation: Activation, params: type[Any] | None, *, dispatcher: Dispatcher | None = None) -> str:
    """Say why ``fused_cpu`` cannot run such experts; "" if it can.

    Args:
        activation: of the experts.
        params: the type of their parameters; None is that of experts without biases.
        dispatcher: of the layer; None is dropless.

    Returns:
        A reason, or "".

    Example:
        >>> why_not_fused_cpu(SWIGLU, PackedGatedParams), why_not_fused_cpu(CLAMPED_SWIGLU, None)
        ('', 'it does not know clamped_swiglu')
    """
    if params not in (None, GatedParams, PackedGatedParams, MlpParams):
        return f"it does not take {params.__name__}"
    if activation.function == CLAMPED_SWIGLU.function:
        return "it does not know clamped_swiglu"
    return "" if dispatcher is None else _why_not_moved(dispatcher)


def _matmul_for(
    device: torch.device, dtype: torch.dtype, dispatcher: Dispatcher, widths: tuple[int, int] | None
) -> tuple[str, GroupedMatmul, str]:
    padded = _pads(dispatcher)
    aligned = widths is None or all(width * dtype.itemsize % 16 == 0 for width in widths)
    if device.type == "cuda" and aligned and dtype == torch.bfloat16:
        return "grouped", grouped, "cuda in bfloat16: torch's grouped_mm"
    if device.type == "cuda" and not padded and not why_not_fused(device, dtype):  # torch's waits for the sizes
        return "triton", _triton(dtype), f"cuda in {_word(dtype)}, widths {widths}: a product in Triton"
    if device.type == "cuda" and not padded and aligned and dtype in KERNEL_DTYPES:
        return "grouped", grouped, f"cuda in {_word(dtype)}: torch's grouped_mm"
    if device.type == "meta" and not padded:
        return "grouped", grouped, "meta, which has shapes alone: sizes cannot be read"
    if device.type == "cpu" and not padded:
        return "grouped", grouped, f"the CPU in {_word(dtype)}: each group's product, written into its place"
    if padded:
        return "batched", batched, f"{device.type} in {_word(dtype)}, groups of equal size: one batched product"
    return "loop", loop, f"{device.type} in {_word(dtype)}, widths {widths}: no grouped product takes them"


def _triton(dtype: torch.dtype) -> GroupedMatmul:
    precision = float32_products() if dtype == torch.float32 else "ieee"
    return triton if precision == "ieee" else partial(triton, precision=precision)


def _what_is_kept(keep: Keep) -> str:
    if keep.rows and keep.preactivation:
        return "the rows of tokens and pre-activations"
    return f"{'the rows of tokens' if keep.rows else 'pre-activations' if keep.preactivation else 'its inputs'} alone"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
