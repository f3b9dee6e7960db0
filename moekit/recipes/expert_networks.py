"""Which expert network over a grouped matmul computes what an activation says, for every type of parameters."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moekit.experts import (
    CLAMPED_SWIGLU,
    GEGLU,
    GEGLU_TANH,
    GELU_MLP,
    RELU2,
    RELU_MLP,
    SWIGLU,
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
from moekit.types import GroupedMatmul, Groups

Network = Callable[..., Tensor]


def experts_of(activation: Activation, params: type[Any] | None = None) -> Network:
    """Find the expert network over a grouped matmul that computes what an activation of a fused layer says.

    Args:
        activation: of a fused layer.
        params: the type of the experts' parameters; None is the one without biases, ``GatedParams`` or ``MlpParams``.

    Returns:
        A function (rows, groups, params, matmul=) -> rows. That of ``PackedGatedParams`` computes with views of them.

    Raises:
        ValueError: if moekit has no such network, or none with such parameters.

    Example:
        >>> experts_of(SWIGLU).__name__, experts_of(SWIGLU, BiasedGatedParams).func.__name__
        ('swiglu', 'biased_gated')
    """
    if activation.function == CLAMPED_SWIGLU.function and activation.gated:
        networks = _clamped(activation)
    elif activation in _plain():
        networks = _networks(activation)
    else:
        expected = [*_plain(), CLAMPED_SWIGLU]
        raise ValueError(f"experts_of: {activation} is no expert network of moekit's; expected one of {expected}.")
    kind = next(iter(networks)) if params is None else params
    if kind not in networks:
        raise ValueError(
            f"experts_of: the parameters are {kind.__name__}, and the activation {activation}; expected "
            f"{', '.join(each.__name__ for each in networks)}. Pass the activation of these experts, or other "
            f"parameters."
        )
    return networks[kind]


def _plain() -> dict[Activation, tuple[Network, Callable[[Tensor], Tensor]]]:
    """Map activations to the network without biases, and to the function of those with biases."""
    tanh = partial(F.gelu, approximate="tanh")
    return {
        SWIGLU: (swiglu, F.silu),
        GEGLU: (geglu, F.gelu),
        GEGLU_TANH: (partial(geglu, approximate="tanh"), tanh),
        GELU_MLP: (gelu_mlp, tanh),
        RELU_MLP: (relu_mlp, F.relu),
        RELU2: (relu2, _squared_relu),
    }


def _networks(activation: Activation) -> dict[type[Any], Network]:
    network, function = _plain()[activation]
    if not activation.gated:
        return {MlpParams: network, BiasedMlpParams: partial(biased_mlp, activation=function)}
    biased = partial(biased_gated, activation=function)
    return {GatedParams: network, BiasedGatedParams: biased, PackedGatedParams: partial(_packed, network=network)}


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


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()
