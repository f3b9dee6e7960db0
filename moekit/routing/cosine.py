"""The cosine gate: experts are scored by direction alone, in a space of few dimensions."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.routing.gates import check_parts, linear_gate

_LARGEST_TEMPERATURE = math.log(100)  # of Swin Transformer v2 and Tutel


class CosineGateParams(NamedTuple):
    """Parameters of the cosine gate.

    Attributes:
        projection: (D, d), from tokens to the routing space.
        experts: (E, d), the direction of each expert.
        temperature: (1,), the logarithm of the factor on the cosines.

    Example:
        >>> params = CosineGateParams(torch.eye(4, 2), torch.eye(2), torch.zeros(1))
        >>> cosine_gate(torch.tensor([[3.0, 0.0, 0.0, 0.0]]), params)
        tensor([[1., 0.]])
    """

    projection: Tensor
    experts: Tensor
    temperature: Tensor


def cosine_gate(x: Tensor, params: CosineGateParams) -> Tensor:
    """Score experts by the cosine to the projected token, z_e = exp(min(tau, ln 100)) <W x / |W x|, v_e / |v_e|>.

    Low-rank and bounded, so that tokens do not collapse towards the experts' directions. The paper divides the cosines
    by a learned temperature; this is the logarithm of its inverse, capped, which is Tutel's form.

    Causal. No host synchronisation. Deterministic on CUDA. In float32 even inside autocast.

    Args:
        x: (T, D), any floating dtype.
        params: of the gate.

    Returns:
        (T, E) float32 logits, of at most 100 in size. A token that projects to zero gets zeros.

    Raises:
        ValueError: if the widths do not match, or the parameters are another gate's.

    Example:
        >>> params = CosineGateParams(torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.zeros(1))
        >>> cosine_gate(torch.tensor([[7.0, 0.0]]), params)
        tensor([[1., 0.]])

    References:
        Chi et al., On the Representation Collapse of Sparse Mixture of Experts, 2022 (X-MoE),
        https://arxiv.org/abs/2204.09179
    """
    check_parts("cosine_gate", params, CosineGateParams)
    if params.experts.ndim != 2 or params.experts.shape[1] != params.projection.shape[-1]:
        raise ValueError(
            f"cosine_gate: projection has shape {tuple(params.projection.shape)} and experts "
            f"{tuple(params.experts.shape)}; expected (D, d) and (E, d) with the same d."
        )
    tokens = F.normalize(linear_gate(x, params.projection), dim=-1)  # (T, d)
    experts = F.normalize(params.experts.to(tokens.dtype), dim=-1)  # (E, d)
    factor = params.temperature.to(tokens.dtype).clamp_max(_LARGEST_TEMPERATURE).exp()
    return linear_gate(tokens, experts.T) * factor


def init_cosine_gate(
    dim: int,
    num_experts: int,
    *,
    projected: int | None = None,
    temperature: float = 0.3,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CosineGateParams:
    """Draw the parameters of a cosine gate.

    Args:
        dim: D.
        num_experts: E.
        projected: d, the width of the routing space; None takes the paper's E / 2, but not less than 2. Tutel has 256.
        temperature: what cosines are divided by at first; the paper has 0.3, Tutel 0.5.
        generator: of the draw; None takes torch's global one.
        device: as in torch.empty.
        dtype: as in torch.empty.

    Returns:
        CosineGateParams.

    Raises:
        ValueError: if the temperature is not positive.

    Example:
        >>> params = init_cosine_gate(64, 32)
        >>> params.projection.shape, params.experts.shape
        (torch.Size([64, 16]), torch.Size([32, 16]))
    """
    if not temperature > 0:
        raise ValueError(f"init_cosine_gate: temperature = {temperature}; expected a positive number, such as 0.3.")
    width = max(num_experts // 2, 2) if projected is None else projected
    projection = torch.empty(dim, width, device=device, dtype=dtype).normal_(std=dim**-0.5, generator=generator)
    experts = torch.empty(num_experts, width, device=device, dtype=dtype).normal_(std=width**-0.5, generator=generator)
    return CosineGateParams(projection, experts, torch.full((1,), -math.log(temperature), device=device, dtype=dtype))
