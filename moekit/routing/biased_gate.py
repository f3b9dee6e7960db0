"""A linear gate with a bias that is learned by gradient; not to be mistaken for a selection bias, which is not."""

from typing import NamedTuple

import torch
from torch import Tensor

from moekit.routing.gates import check_parts, init_linear_gate, linear_gate


class BiasedGateParams(NamedTuple):
    """Parameters of a linear gate with a bias.

    Attributes:
        w: (D, E).
        b: (E,).

    Example:
        >>> params = BiasedGateParams(torch.zeros(4, 2), torch.tensor([0.0, 1.0]))
        >>> biased_gate(torch.ones(1, 4), params)
        tensor([[0., 1.]])
    """

    w: Tensor
    b: Tensor


def biased_gate(x: Tensor, params: BiasedGateParams) -> Tensor:
    """Score every expert for every token, z = x W + b, in float32 even inside autocast.

    The bias is part of the logits: it moves the choice and the weights, and the output trains it. A router's ``bias``
    moves the choice alone.

    Causal. No host synchronisation. Deterministic on CUDA.

    Args:
        x: (T, D), any floating dtype.
        params: of D inputs and E experts.

    Returns:
        (T, E) float32 logits (float64 if ``x`` is float64).

    Raises:
        ValueError: if the widths do not match, or the parameters are another gate's.

    Example:
        >>> biased_gate(torch.ones(1, 3), BiasedGateParams(torch.ones(3, 2), torch.tensor([0.0, 0.5])))
        tensor([[3.0000, 3.5000]])

    References:
        OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, 2025, section 2.2 (a linear router projection),
            https://arxiv.org/abs/2508.10925; the bias is in its released code and weights
    """
    check_parts("biased_gate", params, BiasedGateParams)
    if params.b.shape != params.w.shape[1:]:
        raise ValueError(
            f"biased_gate: w has shape {tuple(params.w.shape)} and b {tuple(params.b.shape)}; expected (D, E) and (E,) "
            f"with the same E. Draw both with init_biased_gate."
        )
    logits = linear_gate(x, params.w)
    return logits + params.b.to(logits.dtype)


def init_biased_gate(
    dim: int,
    num_experts: int,
    *,
    std: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BiasedGateParams:
    """Draw the weights of a linear gate from a normal distribution, with zero biases.

    Args:
        dim: D.
        num_experts: E.
        std: standard deviation of the weights; None takes 1 / sqrt(D).
        generator: of the draw; None takes torch's global one.
        device: as in torch.empty.
        dtype: as in torch.empty.

    Returns:
        BiasedGateParams.

    Example:
        >>> init_biased_gate(16, 4).b
        tensor([0., 0., 0., 0.])
    """
    w = init_linear_gate(dim, num_experts, std=std, generator=generator, device=device, dtype=dtype)
    return BiasedGateParams(w, torch.zeros(num_experts, device=device, dtype=dtype))
