"""Which expert network over a grouped matmul computes what an activation says, for every type of parameters."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moekit.experts import (
    CLAMPED_SWIGLU,
    Activation,
    BiasedGatedParams,
    BiasedMlpParams,
    GatedParams,
    MlpParams,
    PackedGatedParams,
    biased_gated,
    biased_mlp,
    clamped_swiglu,
    geglu,
    gelu_mlp,
    relu2,
    relu_mlp,
    swiglu,
    unpack_gated,
)
from moekit.experts.checks import check_activation
from moekit.types import GroupedMatmul, Groups

Network = Callable[..., Tensor]


def experts_of(activation: Activation, params: type[Any] | None = None) -> Network:
    """Find the expert network over a grouped matmul that computes what an activation of a fused layer says.

    What has no function of its own among moekit's, as ReGLU, is composed: f(x W_gate) * (x W_up), or f(x W_up).

    Args:
        activation: of a fused layer, any that its kernels know.
        params: the type of the experts' parameters; None is the one without biases, ``GatedParams`` or ``MlpParams``.

    Returns:
        A function (rows, groups, params, matmul=) -> rows. That of ``PackedGatedParams`` computes with views of them.

    Raises:
        ValueError: if the kernels know no such activation, or moekit no network with such parameters.

    Example:
        >>> import torch
        >>> from moekit.experts import SWIGLU, init_gated, loop
        >>> experts_of(SWIGLU).__name__, experts_of(SWIGLU, BiasedGatedParams).func.__name__
        ('swiglu', 'biased_gated')
        >>> reglu, groups = experts_of(Activation("relu", gated=True)), Groups(torch.tensor([1, 2]), None)
        >>> reglu(torch.ones(3, 4), groups, init_gated(2, 4, 8), matmul=loop).shape
        torch.Size([3, 4])
    """
    check_activation("experts_of", activation)
    networks = _clamped(activation) if activation.function == CLAMPED_SWIGLU.function else _networks(activation)
    if not isinstance(params, type | None):
        raise ValueError(
            f"experts_of: the type of the parameters is given as a {type(params).__name__}; expected one of "
            f"{_names(networks)}. Pass the type, type(params)."
        )
    kind = next(iter(networks)) if params is None else params
    if kind not in networks:
        raise ValueError(_unfit(kind, activation, _names(networks)))
    return networks[kind]


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": partial(F.gelu, approximate="tanh"),
        "relu": F.relu,
        "relu2": _squared_relu,
    }
)
ACTIVATIONS = tuple(Activation(function, gated) for function in _FUNCTIONS for gated in (True, False))
"""What ``experts_of`` finds networks of, beside ``CLAMPED_SWIGLU``, which has constants."""

_GATED: Mapping[str, Network] = MappingProxyType(
    {"silu": swiglu, "gelu": geglu, "gelu_tanh": partial(geglu, approximate="tanh")}
)
_MLPS: Mapping[str, Network] = MappingProxyType(
    {"gelu": partial(gelu_mlp, approximate="none"), "gelu_tanh": gelu_mlp, "relu": relu_mlp, "relu2": relu2}
)


def _networks(activation: Activation) -> dict[type[Any], Network]:
    name, composed = activation.function, partial(_composed, activation=activation)
    function = _FUNCTIONS[name]
    if not activation.gated:
        return {MlpParams: _MLPS.get(name, composed), BiasedMlpParams: partial(biased_mlp, activation=function)}
    network, biased = _GATED.get(name, composed), partial(biased_gated, activation=function)
    return {GatedParams: network, BiasedGatedParams: biased, PackedGatedParams: partial(_packed, network=network)}


def _composed(rows: Tensor, groups: Groups, params: Any, *, matmul: GroupedMatmul, activation: Activation) -> Tensor:
    kind = GatedParams if activation.gated else MlpParams
    if getattr(params, "_fields", None) != kind._fields:  # biases that were left out would be no error, but wrong
        raise ValueError(_unfit(type(params), activation, kind.__name__))
    function = _FUNCTIONS[activation.function]
    if activation.gated:
        hidden = function(matmul(rows, groups, params.gate)) * matmul(rows, groups, params.up)
    else:
        hidden = function(matmul(rows, groups, params.up))
    return matmul(hidden, groups, params.down)


def _unfit(kind: type[Any], activation: Activation, expected: str) -> str:
    return (
        f"experts_of: the parameters are {kind.__name__}, and the activation {activation}; expected {expected}. Pass "
        f"the activation of these experts, or other parameters."
    )


def _names(networks: Mapping[type[Any], Network]) -> str:
    return ", ".join(kind.__name__ for kind in networks)


def _clamped(activation: Activation) -> dict[type[Any], Network]:
    biased = partial(clamped_swiglu, alpha=activation.alpha, limit=activation.limit)
    network = partial(_without_biases, network=biased)
    return {GatedParams: network, BiasedGatedParams: biased, PackedGatedParams: partial(_packed, network=network)}


def _packed(
    rows: Tensor, groups: Groups, params: PackedGatedParams, *, matmul: GroupedMatmul, network: Network
) -> Tensor:
    return network(rows, groups, unpack_gated(params), matmul=matmul)


def _without_biases(
    rows: Tensor, groups: Groups, params: GatedParams, *, matmul: GroupedMatmul, network: Network
) -> Tensor:
    hidden = params.up.new_zeros(params.up.shape[0], 1, params.up.shape[2])
    out = params.down.new_zeros(params.down.shape[0], 1, params.down.shape[2])
    return network(rows, groups, BiasedGatedParams(*params, hidden, hidden, out), matmul=matmul)
