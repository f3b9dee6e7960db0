"""Experts with biases, over any grouped matmul. A bias is stored (E, 1, F): one row for all rows of an expert."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.experts.checks import PASS_TURNED, turned
from moekit.experts.ffns import check_network_params, init_gated, init_mlp
from moekit.types import GroupedMatmul, Groups

_COLUMNS = 8  # of the product that adds biases: 16 bytes in the narrowest dtype, which CUDA's grouped_mm asks for


class BiasedGatedParams(NamedTuple):
    """Parameters of gated experts with biases.

    Attributes:
        gate: (E, D, F), the projection that goes through the activation.
        up: (E, D, F), the projection that it multiplies.
        down: (E, F, D).
        gate_bias: (E, 1, F).
        up_bias: (E, 1, F).
        down_bias: (E, 1, D).

    Example:
        >>> from moekit.experts import init_biased_gated
        >>> init_biased_gated(2, 4, 8).gate_bias.shape
        torch.Size([2, 1, 8])
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor
    up_bias: Tensor
    down_bias: Tensor


class BiasedMlpParams(NamedTuple):
    """Parameters of two-matrix experts with biases.

    Attributes:
        up: (E, D, F).
        down: (E, F, D).
        up_bias: (E, 1, F).
        down_bias: (E, 1, D).

    Example:
        >>> from moekit.experts import init_biased_mlp
        >>> init_biased_mlp(2, 4, 8).down_bias.shape
        torch.Size([2, 1, 4])
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor
    down_bias: Tensor


def clamped_swiglu(
    rows: Tensor,
    groups: Groups,
    params: BiasedGatedParams,
    *,
    matmul: GroupedMatmul,
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """Apply gpt-oss's experts: (a sigmoid(alpha a) * (u + 1)) W_down + b_down, with both projections clamped.

    a = min(x W_gate + b_gate, limit) and u = clamp(x W_up + b_up, -limit, limit). With alpha 1.702 the gate is the
    sigmoid form of GELU. Gradients pass up to the limit, itself included, and none past it.

    The biases of D outputs are one for all ranks, so ranks that share an expert's hidden dimension cannot run it.

    Args:
        rows: (R, D).
        groups: of E groups.
        params: of E experts.
        matmul: the backend.
        alpha: the steepness of the gate.
        limit: where projections are clamped.

    Returns:
        (R, D); rows past the last group are undefined.

    Raises:
        ValueError: if the parameters are of another kind, or a bias is not (E, 1, .) of the width it is added to.

    Example:
        >>> from moekit.experts import loop
        >>> groups = Groups(torch.tensor([1, 2]), None)
        >>> clamped_swiglu(torch.ones(3, 4), groups, init_biased_gated(2, 4, 8), matmul=loop).shape
        torch.Size([3, 4])

    References:
        OpenAI, gpt-oss-120b & gpt-oss-20b Model Card, 2025, section 2.2 (clamping and a residual connection in
            SwiGLU), https://arxiv.org/abs/2508.10925
        OpenAI, gpt-oss, ``gpt_oss/torch/model.py`` (the constants), https://github.com/openai/gpt-oss
    """
    check_network_params("clamped_swiglu", params, BiasedGatedParams)
    gate = affine(rows, groups, (params.gate, params.gate_bias), matmul=matmul)
    up = affine(rows, groups, (params.up, params.up_bias), matmul=matmul)
    # On a limit the gradient of torch.clamp is 1 up to torch 2.13, and 0 later.
    gate, up = gate.masked_fill(gate > limit, limit), up.masked_fill(up > limit, limit)
    up = up.masked_fill(up < -limit, -limit)
    hidden = gate * torch.sigmoid(alpha * gate) * (up + 1)
    return affine(hidden, groups, (params.down, params.down_bias), matmul=matmul)


def biased_gated(
    rows: Tensor,
    groups: Groups,
    params: BiasedGatedParams,
    *,
    matmul: GroupedMatmul,
    activation: Callable[[Tensor], Tensor] = F.silu,
) -> Tensor:
    """Apply gated experts with biases: (f(x W_gate + b_gate) * (x W_up + b_up)) W_down + b_down.

    The biases of D outputs are one for all ranks, so ranks that share an expert's hidden dimension cannot run it.

    Args:
        rows: (R, D).
        groups: of E groups.
        params: of E experts.
        matmul: the backend.
        activation: f, entry by entry.

    Returns:
        (R, D); rows past the last group are undefined.

    Raises:
        ValueError: if the parameters are of another kind, or a bias is not (E, 1, .) of the width it is added to.

    Example:
        >>> from moekit.experts import loop
        >>> groups = Groups(torch.tensor([1, 2]), None)
        >>> biased_gated(torch.ones(3, 4), groups, init_biased_gated(2, 4, 8), matmul=loop).shape
        torch.Size([3, 4])

    References:
        Shazeer, GLU Variants Improve Transformer, 2020, equation 5 (the gated units with biases),
            https://arxiv.org/abs/2002.05202
    """
    check_network_params("biased_gated", params, BiasedGatedParams)
    gate = activation(affine(rows, groups, (params.gate, params.gate_bias), matmul=matmul))
    hidden = gate * affine(rows, groups, (params.up, params.up_bias), matmul=matmul)
    return affine(hidden, groups, (params.down, params.down_bias), matmul=matmul)


def biased_mlp(
    rows: Tensor,
    groups: Groups,
    params: BiasedMlpParams,
    *,
    matmul: GroupedMatmul,
    activation: Callable[[Tensor], Tensor] = partial(F.gelu, approximate="tanh"),  # noqa: B008, an immutable function
) -> Tensor:
    """Apply two-matrix experts with biases: f(x W_up + b_up) W_down + b_down.

    The biases of D outputs are one for all ranks, so ranks that share an expert's hidden dimension cannot run it.

    Args:
        rows: (R, D).
        groups: of E groups.
        params: of E experts.
        matmul: the backend.
        activation: f, entry by entry.

    Returns:
        (R, D); rows past the last group are undefined.

    Raises:
        ValueError: if the parameters are of another kind, or a bias is not (E, 1, .) of the width it is added to.

    Example:
        >>> from moekit.experts import loop
        >>> groups = Groups(torch.tensor([1, 2]), None)
        >>> biased_mlp(torch.ones(3, 4), groups, init_biased_mlp(2, 4, 8), matmul=loop, activation=F.relu).shape
        torch.Size([3, 4])

    References:
        Vaswani et al., Attention Is All You Need, 2017, equation 2, https://arxiv.org/abs/1706.03762
    """
    check_network_params("biased_mlp", params, BiasedMlpParams)
    hidden = activation(affine(rows, groups, (params.up, params.up_bias), matmul=matmul))
    return affine(hidden, groups, (params.down, params.down_bias), matmul=matmul)


def affine(rows: Tensor, groups: Groups, weights: tuple[Tensor, Tensor], *, matmul: GroupedMatmul) -> Tensor:
    """Multiply each group's rows by its expert's matrix and add its expert's bias: y_r = x_r W_e + b_e.

    What rows past the last group hold, NaN included, reaches neither gradient of the two. No host synchronisation
    beyond the backend's. Deterministic on CUDA if the backend is.

    Args:
        rows: (R, D).
        groups: of E groups.
        weights: W (E, D, F) and b (E, 1, F).
        matmul: the backend.

    Returns:
        (R, F); rows past the last group are undefined.

    Raises:
        ValueError: if the bias is not (E, 1, F).

    Example:
        >>> from moekit.experts import loop
        >>> weights = torch.zeros(2, 2, 1), torch.tensor([[[1.0]], [[2.0]]])
        >>> affine(torch.ones(3, 2), Groups(torch.tensor([1, 2]), None), weights, matmul=loop).flatten()
        tensor([1., 2., 2.])
    """
    w, bias = weights
    if not _adds(bias.shape, w.shape):
        lies_turned = _adds(bias.shape, turned(w.shape)) and rows.shape[-1:] == w.shape[2:]
        mend = f"These weights fit the other way round: {PASS_TURNED}" if lies_turned else _INSERT
        raise ValueError(
            f"affine: w has shape {tuple(w.shape)} and the bias {tuple(bias.shape)}; expected (E, D, F) and (E, 1, F) "
            f"with the same E and F. {mend}"
        )
    out = matmul(rows, groups, w)  # (R, F)
    if groups.capacity is not None:  # equal groups, so that the gradient of a bias is a plain sum
        return (out.unflatten(0, (w.shape[0], groups.capacity)) + bias.to(out.dtype)).flatten(0, 1)
    # A product with ones: its gradient is each group's sum, taken in float32 by every backend, without atomics.
    column = F.pad(bias, (0, 0, 0, _COLUMNS - 1))  # (E, 8, F), zero but for the first row
    return out + matmul(column.new_ones(rows.shape[0], _COLUMNS), groups, column)


_INSERT = "Insert the axis with bias.unsqueeze(1)."


def _adds(bias: Sequence[int], w: Sequence[int]) -> bool:
    return len(w) == 3 and tuple(bias) == (w[0], 1, w[2])


def init_biased_gated(
    num_experts: int,
    dim: int,
    hidden: int | None = None,
    *,
    std: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BiasedGatedParams:
    """Draw gated experts from a normal distribution, with zero biases.

    Args:
        num_experts: E.
        dim: D.
        hidden: F; None takes what ``init_gated`` takes.
        std: standard deviation of all three matrices; None takes 1 / sqrt(inputs) of each.
        generator: of the draw; None takes torch's global one.
        device: as in torch.empty.
        dtype: as in torch.empty.

    Returns:
        BiasedGatedParams.

    Example:
        >>> init_biased_gated(2, 96).up_bias.shape
        torch.Size([2, 1, 256])
    """
    drawn = init_gated(num_experts, dim, hidden, std=std, generator=generator, device=device, dtype=dtype)
    hidden_bias = drawn.up.new_zeros(num_experts, 1, drawn.up.shape[2])
    return BiasedGatedParams(*drawn, hidden_bias, hidden_bias.clone(), drawn.down.new_zeros(num_experts, 1, dim))


def init_biased_mlp(
    num_experts: int,
    dim: int,
    hidden: int | None = None,
    *,
    std: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> BiasedMlpParams:
    """Draw two-matrix experts from a normal distribution, with zero biases.

    Args:
        num_experts: E.
        dim: D.
        hidden: F; None takes what ``init_mlp`` takes.
        std: standard deviation of both matrices; None takes 1 / sqrt(inputs) of each.
        generator: of the draw; None takes torch's global one.
        device: as in torch.empty.
        dtype: as in torch.empty.

    Returns:
        BiasedMlpParams.

    Example:
        >>> init_biased_mlp(2, 16).up_bias.shape
        torch.Size([2, 1, 64])
    """
    drawn = init_mlp(num_experts, dim, hidden, std=std, generator=generator, device=device, dtype=dtype)
    biases = (drawn.up.new_zeros(num_experts, 1, drawn.up.shape[2]), drawn.down.new_zeros(num_experts, 1, dim))
    return BiasedMlpParams(*drawn, *biases)
