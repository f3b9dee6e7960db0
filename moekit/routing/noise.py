"""Noise in routing: Shazeer's noisy gate, and wrappers that put noise into any gate.

All of it draws from torch's global generator, and only while ``training``. A gate that these functions return takes
(x, params, *, training=True); wrapped gates that know ``training`` themselves are told.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.routing.gates import check_parts, clean, linear_gate, noisy
from moekit.routing.top_k import softmax_of_top_k
from moekit.types import Gate, Logits, NoisyLogits, Routing

_LEAST_STD = 1e-2  # Shazeer et al. leave it open; T2T's released code, which FastMoE follows, adds this number


class NoisyGateParams(NamedTuple):
    """Parameters of the noisy gate.

    Attributes:
        w: (D, E), of the logits.
        noise: (D, E), of the standard deviation of their noise.

    Example:
        >>> params = NoisyGateParams(torch.zeros(4, 8), torch.zeros(4, 8))
        >>> noisy_gate(torch.ones(3, 4), params, training=False).logits.shape
        torch.Size([3, 8])
    """

    w: Tensor
    noise: Tensor


def noisy_gate(x: Tensor, params: NoisyGateParams, *, training: bool = True) -> NoisyLogits:
    """Score experts with learned noise, h = z + n * std, where z = x W, std = softplus(x W_n) + 0.01 and n ~ N(0, 1).

    Causal. No host synchronisation. Deterministic on CUDA for a given seed.

    Args:
        x: (T, D), any floating dtype.
        params: of the gate.
        training: whether to draw noise; without it ``logits`` are the clean ones, and ``std`` stays.

    Returns:
        NoisyLogits, (T, E) float32 each.

    Raises:
        ValueError: if the widths do not match, or the parameters are another gate's.

    Example:
        >>> noisy_gate(torch.ones(2, 3), init_noisy_gate(3, 4), training=False).std[0, 0].item()
        0.7031471729278564

    References:
        Shazeer et al., Outrageously Large Neural Networks, 2017, equations 3 to 5, https://arxiv.org/abs/1701.06538
    """
    check_parts("noisy_gate", params, NoisyGateParams)
    z = linear_gate(x, params.w)
    std = F.softplus(linear_gate(x, params.noise)) + _LEAST_STD
    return NoisyLogits(z + torch.randn_like(z) * std if training else z, z, std)


def init_noisy_gate(
    dim: int,
    num_experts: int,
    *,
    std: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> NoisyGateParams:
    """Make the parameters of a noisy gate; zeros, as in the paper's appendix A, so that loads begin about equal.

    Args:
        dim: D.
        num_experts: E.
        std: standard deviation of both, for a start that is not the paper's.
        generator: of the draw; None takes torch's global one.
        device: as in torch.empty.
        dtype: as in torch.empty.

    Returns:
        NoisyGateParams.

    Example:
        >>> init_noisy_gate(16, 4).noise.shape
        torch.Size([16, 4])
    """
    w, noise = (torch.zeros(dim, num_experts, device=device, dtype=dtype) for _ in range(2))
    if std:
        w.normal_(std=std, generator=generator)
        noise.normal_(std=std, generator=generator)
    return NoisyGateParams(w, noise)


def noisy_top_k(logits: Logits, *, k: int, bias: Tensor | None = None) -> Routing:
    """Choose the k largest noisy logits, and weigh by the softmax over those alone: S = topK(h + b), g = softmax(h_S).

    This is ``softmax_of_top_k`` of ``logits.logits``. Logits without noise are taken as they are.

    Causal. No host synchronisation. Deterministic on CUDA; ties are broken as ``torch.topk`` breaks them.

    Args:
        logits: from a gate with noise, (T, E) float32.
        k: experts per token, 1 <= k <= E.
        bias: (E,) added to the logits for the selection only.

    Returns:
        Routing of shape (T, k); weights sum to one.

    Raises:
        ValueError: if k is not between 1 and E, or a shape or dtype does not fit.

    Example:
        >>> noisy_top_k(noisy_gate(torch.ones(5, 3), init_noisy_gate(3, 4)), k=2).weights.shape
        torch.Size([5, 2])

    References:
        Shazeer et al., Outrageously Large Neural Networks, 2017, equations 3 to 5, https://arxiv.org/abs/1701.06538
    """
    return softmax_of_top_k(logits, k=k, bias=bias)


def input_jitter(gate: Gate, *, eps: float = 1e-2) -> Gate:
    """Let a gate see tokens times U(1 - eps, 1 + eps), drawn for every entry. The experts see the tokens as they are.

    The product is in float32, so that tokens in half precision are moved by as little as ``eps`` says. Causal. No host
    synchronisation. Deterministic on CUDA for a given seed.

    Args:
        gate: to wrap.
        eps: in [0, 1); Switch has 0.01.

    Returns:
        A gate that also takes ``training``.

    Raises:
        ValueError: if eps is not in [0, 1).

    Example:
        >>> gate = input_jitter(linear_gate, eps=0.5)
        >>> logits = gate(torch.ones(3, 1), torch.ones(1, 2))
        >>> bool((logits >= 0.5).all() and (logits <= 1.5).all())
        True

    References:
        Fedus et al., Switch Transformers, 2021, appendix C, https://arxiv.org/abs/2101.03961
    """
    if not 0 <= eps < 1:
        raise ValueError(f"input_jitter: eps = {eps}; expected 0 <= eps < 1. Switch's is 0.01; 0 means no jitter.")
    return partial(_jittered, gate=_told(gate), eps=eps)


def logit_noise(gate: Gate, *, std: float = 1.0) -> Gate:
    """Add normal noise of standard deviation ``std`` / E to a gate's logits, as V-MoE.

    Causal. No host synchronisation. Deterministic on CUDA for a given seed.

    Args:
        gate: to wrap. Where it makes noise itself, the variances add up.
        std: E times the standard deviation; V-MoE has 1.

    Returns:
        A gate that also takes ``training`` and returns NoisyLogits.

    Raises:
        ValueError: if std is negative.

    Example:
        >>> logit_noise(linear_gate)(torch.ones(1, 3), torch.zeros(3, 4)).std
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])

    References:
        Riquelme et al., Scaling Vision with Sparse Mixture of Experts, 2021, section 2.1,
        https://arxiv.org/abs/2106.05974
    """
    if not std >= 0:
        raise ValueError(f"logit_noise: std = {std}; expected a number >= 0. V-MoE's is 1, which is divided by E.")
    return partial(_with_noise, gate=_told(gate), noise=partial(_normal, std=std))


def gumbel_noise(gate: Gate) -> Gate:
    """Add standard Gumbel noise to a gate's logits: the k largest are then k draws from their softmax, none twice.

    The standard deviation is pi / sqrt(6); the noise is not normal, as losses over the noise suppose. Causal. No host
    synchronisation. Deterministic on CUDA for a given seed.

    Args:
        gate: to wrap.

    Returns:
        A gate that also takes ``training`` and returns NoisyLogits.

    Example:
        >>> gumbel_noise(linear_gate)(torch.ones(1, 3), torch.zeros(3, 2)).std
        tensor([[1.2825, 1.2825]])

    References:
        Kool et al., Stochastic Beams and Where to Find Them, 2019, section 2.3, https://arxiv.org/abs/1903.06059
    """
    return partial(_with_noise, gate=_told(gate), noise=_gumbel)


def _jittered(x: Tensor, params: Any, *, gate: Callable[..., Any], eps: float, training: bool = True) -> Any:
    if training:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * torch.empty_like(x).uniform_(1 - eps, 1 + eps)
    return gate(x, params, training=training)


def _with_noise(
    x: Tensor, params: Any, *, gate: Callable[..., Logits], noise: Callable[[Tensor], "_Noise"], training: bool = True
) -> NoisyLogits:
    before = gate(x, params, training=training)
    z = noisy(before)
    draw, std = noise(z)
    added = torch.full_like(z, std)
    total = torch.hypot(before.std, added) if isinstance(before, NoisyLogits) else added
    return NoisyLogits(z + draw() if training else z, clean(before), total)


class _Noise(NamedTuple):
    draw: Callable[[], Tensor]
    std: float


def _normal(z: Tensor, *, std: float) -> _Noise:
    each = std / z.shape[-1]
    return _Noise(lambda: torch.randn_like(z) * each, each)


def _gumbel(z: Tensor) -> _Noise:
    return _Noise(partial(_standard_gumbel, z), math.pi / math.sqrt(6))


def _standard_gumbel(z: Tensor) -> Tensor:
    # Clamped: an exponential variate may round to zero.
    return -torch.empty_like(z).exponential_().clamp_min(torch.finfo(z.dtype).tiny).log()


def _told(gate: Gate) -> Callable[..., Any]:
    """Return the gate as one that takes ``training``, whether or not it makes anything of it."""
    return gate if "training" in inspect.signature(gate).parameters else partial(_untold, gate=gate)


def _untold(x: Tensor, params: Any, *, gate: Gate, training: bool) -> Any:
    return gate(x, params)
