"""OpenLM's initialization: normal distributions cut at three sigma, narrower for outputs of deeper layers."""

import math

import torch
from torch import Tensor, nn


def truncated_normal_(weight: Tensor, *, std: float, generator: torch.Generator | None = None) -> None:
    """Fill a tensor in place from a normal distribution cut off at three standard deviations.

    Args:
        weight: the tensor to fill.
        std: sigma of the distribution before the cut (the cut leaves 0.987 of it).
        generator: source of randomness on the device of ``weight``; None is torch's global one.

    Example:
        >>> w = torch.empty(100)
        >>> truncated_normal_(w, std=0.1)
        >>> bool(w.abs().max() <= 0.3)
        True
    """
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)


def output_std(fan_in: int, *, layer_index: int) -> float:
    """Return sigma for a matrix that writes into the residual stream: ``1 / sqrt(fan_in * 2 * (layer_index + 1))``.

    Args:
        fan_in: the number whose inverse root is the scale at depth zero without the factor 2.
        layer_index: zero-based depth of the layer.

    Returns:
        The standard deviation.

    Example:
        >>> output_std(8, layer_index=0)
        0.25

    References:
        Improving Deep Transformer with Depth-Scaled Initialization and Merged Attention, Zhang et al.,
        https://arxiv.org/abs/1908.11365, 2019.
    """
    return 1.0 / math.sqrt(fan_in * 2 * (layer_index + 1))
