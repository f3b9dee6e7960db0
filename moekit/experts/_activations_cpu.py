"""Activations of expert networks and their derivatives, into memory that is there already."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor


class InPlaceActivation(NamedTuple):
    """A function and its derivative.

    Attributes:
        forward: (h, out) -> f(h), in ``out``.
        backward: (grad, h, out) -> grad * f'(h), in ``out``, which may be ``grad``.
    """

    forward: Callable[[Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def _silu(h: Tensor, out: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.silu.out(h, out=out)
    return result


def _silu_backward(grad: Tensor, h: Tensor, out: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.silu_backward.grad_input(grad, h, grad_input=out)
    return result


def _gelu(h: Tensor, out: Tensor, *, approximate: str) -> Tensor:
    result: Tensor = torch.ops.aten.gelu.out(h, approximate=approximate, out=out)
    return result


def _gelu_backward(grad: Tensor, h: Tensor, out: Tensor, *, approximate: str) -> Tensor:
    result: Tensor = torch.ops.aten.gelu_backward.grad_input(grad, h, approximate=approximate, grad_input=out)
    return result


def _relu(h: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(h, 0, out=out)


def _relu_backward(grad: Tensor, h: Tensor, out: Tensor) -> Tensor:
    result: Tensor = torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=out)
    return result


def _relu2(h: Tensor, out: Tensor) -> Tensor:
    return _relu(h, out).square_()


def _relu2_backward(grad: Tensor, h: Tensor, out: Tensor) -> Tensor:
    return torch.mul(grad, h.clamp_min(0).mul_(2), out=out)


def _gelu_of(approximate: str) -> InPlaceActivation:
    return InPlaceActivation(partial(_gelu, approximate=approximate), partial(_gelu_backward, approximate=approximate))


# An operator's arguments are tensors and plain values: activations reach it by the names of ``activations.Activation``.
ACTIVATIONS: Mapping[str, InPlaceActivation] = MappingProxyType(
    {
        "silu": InPlaceActivation(_silu, _silu_backward),
        "gelu": _gelu_of("none"),
        "gelu_tanh": _gelu_of("tanh"),
        "relu": InPlaceActivation(_relu, _relu_backward),
        "relu2": InPlaceActivation(_relu2, _relu2_backward),
    }
)
