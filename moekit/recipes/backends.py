"""The choice of an expert layer for a device and a dtype, and why: from what is known, without timing anything."""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit.dispatch import dropless
from moekit.experts import batched, geglu, gelu_mlp, grouped, loop, relu2, relu_mlp, swiglu
from moekit.experts.fused import (
    GEGLU,
    GEGLU_TANH,
    GELU_MLP,
    RELU2,
    RELU_MLP,
    SWIGLU,
    Activation,
    fused_layer,
)
from moekit.experts.fused_cpu import fused_cpu
from moekit.experts.tiles import LayerSize, LayerTiles, layer_tiles
from moekit.recipes.layers import expert_layer
from moekit.types import Dispatcher, ExpertLayer, GroupedMatmul, Routing

_HALF = (torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # Ampere: the first GPUs with bfloat16 in Triton's products


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
    widths: tuple[int, int] | None = None,
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
        widths: (D, F), for a backend that asks for alignment; None takes them to be aligned.
        tiles: chooses the tiles of ``fused_layer``'s kernels; ``from_table`` makes one of what `moekit tune` wrote.

    Returns:
        Choice.

    Raises:
        ValueError: if there is no such activation among moekit's expert networks.

    Example:
        >>> choice = choose_backend("cpu", torch.float32)
        >>> choice.name, choice.reason
        ('fused_cpu', 'the CPU: computes expert by expert in the cache, a thread each, and keeps pre-activations alone')
    """
    device = torch.device(device)
    dispatcher = dropless() if dispatcher is None else dispatcher
    if device.type == "cpu":
        reason = "the CPU: computes expert by expert in the cache, a thread each, and keeps pre-activations alone"
        return Choice("fused_cpu", fused_cpu(plan=dispatcher.plan, activation=activation), reason)
    unusable = _why_not_fused(device, dtype, dispatcher)
    if not unusable:
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        reason = f"{device.type} in {_word(dtype)}, dropless, with Triton: gathers rows inside the products"
        return Choice("fused_layer", fused_layer(activation=activation, precision=precision, tiles=tiles), reason)
    name, matmul, reason = _matmul_for(device, dtype, dispatcher, widths)
    layer = expert_layer(dispatcher=dispatcher, experts=partial(experts_of(activation), matmul=matmul))
    return Choice(name, layer, f"{reason}; not fused_layer: {unusable}")


def auto(
    *,
    dispatcher: Dispatcher | None = None,
    activation: Activation = SWIGLU,
    tiles: Callable[[LayerSize], LayerTiles] = layer_tiles,
) -> ExpertLayer:
    """Return an expert layer that chooses its backend when it is called, by the device and dtype of its tokens.

    As causal, synchronising and deterministic as what it chooses: see ``choose_backend``.

    Args:
        dispatcher: of the layer; None is dropless.
        activation: of the experts.
        tiles: chooses the tiles of ``fused_layer``'s kernels, where that is chosen.

    Returns:
        A function (x (T, D), routing, params) -> (T, D).

    Example:
        >>> from moekit.experts import init_gated
        >>> from moekit.recipes import mixtral
        >>> recipe = mixtral()._replace(layer=auto())
        >>> recipe.layer(torch.ones(5, 4), recipe.route(torch.zeros(5, 3)), init_gated(3, 4, 8)).shape
        torch.Size([5, 4])
    """
    dispatcher = dropless() if dispatcher is None else dispatcher
    return partial(_auto, dispatcher=dispatcher, activation=activation, tiles=tiles)


def _auto(
    x: Tensor,
    routing: Routing,
    params: Any,
    *,
    dispatcher: Dispatcher,
    activation: Activation,
    tiles: Callable[[LayerSize], LayerTiles],
) -> Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    widths = (x.shape[1], params[0].shape[2])
    choice = choose_backend(x.device, dtype, dispatcher=dispatcher, activation=activation, widths=widths, tiles=tiles)
    return choice.layer(x, routing, params)


def experts_of(activation: Activation) -> Callable[..., Tensor]:
    """Find the expert network over a grouped matmul that computes what an activation of a fused layer says.

    Args:
        activation: of a fused layer.

    Returns:
        A function (rows, groups, params, matmul=) -> rows.

    Raises:
        ValueError: if moekit has no such network.

    Example:
        >>> experts_of(SWIGLU).__name__
        'swiglu'
    """
    networks: dict[Activation, Callable[..., Tensor]] = {
        SWIGLU: swiglu,
        GEGLU: geglu,
        GEGLU_TANH: partial(geglu, approximate="tanh"),
        GELU_MLP: gelu_mlp,
        RELU_MLP: relu_mlp,
        RELU2: relu2,
    }
    if activation not in networks:
        raise ValueError(f"{activation} is no expert network of moekit's; expected one of {list(networks)}.")
    return networks[activation]


def _why_not_fused(device: torch.device, dtype: torch.dtype, dispatcher: Dispatcher) -> str:
    if device.type != "cuda":
        return f"its kernels are for CUDA devices, not {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {_OLDEST[0]}.{_OLDEST[1]}"
    if dtype not in (*_HALF, torch.float32):
        return f"its kernels do not compute in {_word(dtype)}"
    return "" if dispatcher.plan is dropless().plan else "it drops nothing, and the dispatcher has a capacity"


def _matmul_for(
    device: torch.device, dtype: torch.dtype, dispatcher: Dispatcher, widths: tuple[int, int] | None
) -> tuple[str, GroupedMatmul, str]:
    padded = dispatcher.plan is not dropless().plan
    aligned = widths is None or all(width * dtype.itemsize % 16 == 0 for width in widths)
    if device.type == "cuda" and dtype in (*_HALF, torch.float32) and aligned:
        return "grouped", grouped, f"cuda in {_word(dtype)}: torch's grouped_mm"
    if padded:
        return "batched", batched, f"{device.type} in {_word(dtype)}, groups of equal size: one batched product"
    return "loop", loop, f"{device.type} in {_word(dtype)}, widths {widths}: no grouped product takes them"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
