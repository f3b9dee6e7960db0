"""The experts of a Hugging Face model on moekit's fused layers, where these know them; and why not elsewhere.

Weights are read where the module keeps them, and gradients come back in their layout.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from moekit.autocast import dtype_in_products
from moekit.dispatch import dropless
from moekit.experts import (
    PREACTIVATION,
    Activation,
    BiasedGatedParams,
    BiasedMlpParams,
    Keep,
    LayerSize,
    LayerTiles,
    MlpParams,
    PackedGatedParams,
    fused_cpu,
    fused_layer,
    layer_tiles,
)
from moekit.integrations.hf_experts import ModuleParams, as_weights, experts_modules, module_layer, module_params
from moekit.recipes import backends
from moekit.types import ExpertLayer, Routing

FusedParams = PackedGatedParams | MlpParams | BiasedGatedParams | BiasedMlpParams


def _fused_params(params: ModuleParams) -> FusedParams:
    """View the parameters of an experts module as those of ``fused_layer``. Differentiable, and nothing is copied.

    Without biases gate and up stay the one tensor that they are, so that their gradient is written in one piece; with
    biases autograd puts the gradients of the two halves together.
    """
    activation, up, down = _known(params), params.up, params.down
    if params.up_bias is None or params.down_bias is None:
        packed = PackedGatedParams(up.transpose(1, 2), down.transpose(1, 2))
        return packed if activation.gated else MlpParams(up, down)
    up_bias, down_bias = params.up_bias.unsqueeze(1), params.down_bias.unsqueeze(1)
    if not activation.gated:
        return BiasedMlpParams(up, down, up_bias, down_bias)
    (gate, up), (gate_bias, up_bias) = up.chunk(2, 2), up_bias.chunk(2, 2)
    return BiasedGatedParams(gate, up, down, gate_bias, up_bias, down_bias)


def fused_module_layer(
    *, keep: Keep = PREACTIVATION, tiles: Callable[[LayerSize], LayerTiles] = layer_tiles
) -> ExpertLayer:
    """Return the fused layer for transformers experts modules: dropless, Triton kernels forward and backward.

    As causal, synchronising and deterministic as ``fused_layer``. float32 products are exact, or in TF32 if
    ``torch.set_float32_matmul_precision`` allows it.

    Args:
        keep: what lives from the forward to the backward.
        tiles: chooses the kernels' tiles by the size of the layer.

    Returns:
        A function (x (T, D), routing, ModuleParams) -> (T, D) in the dtype of the parameters, inside autocast in its.

    Raises:
        ValueError: from the layer, if the kernels do not know this form of experts.

    Example:
        >>> from moekit.experts import INPUTS
        >>> layer = fused_module_layer(keep=INPUTS)
    """
    return partial(_fused_module_layer, keep=keep, tiles=tiles)


def _fused_module_layer(
    x: Tensor, routing: Routing, params: ModuleParams, *, keep: Keep, tiles: Callable[[LayerSize], LayerTiles]
) -> Tensor:
    layer = fused_layer(activation=_known(params), keep=keep, precision=backends.float32_products(), tiles=tiles)
    return layer(as_weights(x, params.up), routing, _fused_params(params))


def _cpu_module_layer(x: Tensor, routing: Routing, params: ModuleParams) -> Tensor:
    """Run ``fused_cpu``, for the experts without biases that the kernels know, but for the clamped activation."""
    layer = fused_cpu(plan=dropless().plan, activation=_known(params))
    return layer(as_weights(x, params.up), routing, _fused_params(params))


def auto_module_layer(
    *,
    fused: ExpertLayer = fused_module_layer(),  # noqa: B008, an immutable function
    on_cpu: ExpertLayer = _cpu_module_layer,
    otherwise: ExpertLayer = module_layer(),  # noqa: B008, an immutable function
) -> ExpertLayer:
    """Return the layer that takes ``fused`` for the experts modules that its kernels know, and others for the rest.

    It asks in each call, reading the module and the device; ``why_not_fused`` tells what it will do and why.

    Args:
        fused: over ``ModuleParams``.
        on_cpu: over ``ModuleParams``, for the modules on the CPU that ``fused_cpu`` knows.
        otherwise: over ``ModuleParams``, for every module, device and dtype; as ``module_layer()``.

    Returns:
        A function (x (T, D), routing, ModuleParams) -> (T, D).

    Example:
        >>> from moekit.experts import loop
        >>> layer = auto_module_layer(otherwise=module_layer(matmul=loop))
    """
    return partial(_auto_module_layer, fused=fused, on_cpu=on_cpu, otherwise=otherwise)


def _auto_module_layer(
    x: Tensor,
    routing: Routing,
    params: ModuleParams,
    *,
    fused: ExpertLayer,
    on_cpu: ExpertLayer,
    otherwise: ExpertLayer,
) -> Tensor:
    dtypes = _dtypes(params, x.device)
    if not _why_not(params, x.device, dtypes):
        return fused(x, routing, params)
    layer = on_cpu if x.device.type == "cpu" and not _why_not_on_cpu(params, dtypes) else otherwise
    return layer(x, routing, params)


def why_not_fused(
    model: nn.Module, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Say for each experts module of a model why ``auto_module_layer`` does not take ``fused_layer``.

    On the CPU it takes ``fused_cpu`` for those that this one knows.

    Args:
        model: any module with transformers experts modules in it, or one of these.
        device: to answer for; None is where the module's parameters are.
        dtype: that experts compute in; None is the parameters', inside autocast its.

    Returns:
        From the module's name in the model to the reason; "" where the fused layer runs.

    Raises:
        ValueError: if the model has no experts modules, or a CUDA device is asked about that torch cannot use here.

    Example:
        >>> from transformers.models.mixtral import modeling_mixtral as mixtral
        >>> config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=4)
        >>> why_not_fused(mixtral.MixtralSparseMoeBlock(config))
        {'experts': 'its kernels are for CUDA devices, not cpu'}
    """
    reasons = {}
    for name, module in experts_modules("why_not_fused", model).items():
        params = module_params(module)
        where = params.up.device if device is None else torch.device(device)
        reasons[name] = _why_not(params, where, _dtypes(params, where) if dtype is None else {dtype})
    return reasons


def _why_not(params: ModuleParams, device: torch.device, dtypes: set[torch.dtype]) -> str:
    return _why_neither(params, dtypes) or backends.why_not_fused(device, next(iter(dtypes)))


def _why_not_on_cpu(params: ModuleParams, dtypes: set[torch.dtype]) -> str:
    return _why_neither(params, dtypes) or backends.why_not_fused_cpu(_known(params), type(_fused_params(params)))


def _why_neither(params: ModuleParams, dtypes: set[torch.dtype]) -> str:
    unknown = _why_unknown(params)
    if unknown or len(dtypes) == 1:
        return unknown
    return f"its parameters are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"


def _why_unknown(params: ModuleParams) -> str:
    if params.known is None:
        return "its kernels do not know the activation of these experts"
    return "its kernels do not normalise the outputs of experts" if params.norm is not None else ""


def _dtypes(params: ModuleParams, device: torch.device) -> set[torch.dtype]:
    tensors = (params.up, params.up_bias, params.down, params.down_bias)
    return {dtype_in_products(t.dtype, device.type) for t in tensors if t is not None}


def _known(params: ModuleParams) -> Activation:
    unknown = _why_unknown(params)
    if unknown or params.known is None:
        raise ValueError(
            f"fused_module_layer: {unknown}; expected experts of one of moekit.experts' activations, halves of gate "
            f"and up one after the other, without a norm. Use auto_module_layer() or module_layer()."
        )
    return params.known
