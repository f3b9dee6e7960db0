"""Gates: tokens to router logits."""

from typing import Any

import torch
from torch import Tensor

from moekit.autocast import outside_autocast
from moekit.routing import _half_gates
from moekit.types import Gate, Logits, NoisyLogits


def linear_gate(x: Tensor, w: Tensor) -> Tensor:
    """Score every expert for every token, z = x W, in float32 even inside autocast.

    Router logits in half precision flip decisions between near-equal experts and make the z-loss useless, so the
    product is computed in float32 (float64 if ``x`` is float64).

    bfloat16 tokens on CUDA are not copied to float32 for it: their products with bfloat16 numbers that add up to ``w``
    are exact in float32, where they are summed.

    Causal. No host synchronisation. Deterministic on CUDA.

    Args:
        x: (T, D), any floating dtype.
        w: (D, E).

    Returns:
        (T, E) float32 logits.

    Raises:
        ValueError: if the widths do not match, or ``w`` is no tensor.

    Example:
        >>> linear_gate(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3, 4)).dtype
        torch.float32

    References:
        Shazeer et al., Outrageously Large Neural Networks, 2017, section 2, https://arxiv.org/abs/1701.06538
        Fedus et al., Switch Transformers, 2021, section 2.4 (selective precision), https://arxiv.org/abs/2101.03961
    """
    _check_gate(x, w)
    if _half_gates.takes(x, w):
        return _half_gates.logits(x, w)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with outside_autocast(x.device.type):
        return x.to(dtype) @ w.to(dtype)


def score_and_pass(gate: Gate, x: Tensor, params: Any) -> tuple[Logits, Tensor]:
    """Score tokens by a gate, and return the tokens for what comes after it.

    These are ``x``, but where ``gate`` is ``linear_gate`` and bfloat16 tokens on CUDA want a gradient they come out of
    it in the graph: the gate's backward gets the gradient of what follows, and adds its own in the same kernel. Who
    reads ``x`` twice has autograd add the two, which takes a pass of its own. Behind such a gate there is no gradient
    of a gradient, and who asks for one is told.

    Causal if the gate is. No host synchronisation.

    Args:
        gate: as of a recipe.
        x: (T, D).
        params: of the gate.

    Returns:
        What the gate returns; and (T, D), equal to ``x``.

    Example:
        >>> x = torch.ones(2, 3)
        >>> logits, tokens = score_and_pass(linear_gate, x, torch.ones(3, 4))
        >>> logits.shape, torch.equal(tokens, x)
        (torch.Size([2, 4]), True)
    """
    if gate is linear_gate and isinstance(params, Tensor) and _half_gates.takes(x, params):
        _check_gate(x, params)
        return _half_gates.logits_and_tokens(x, params)
    return gate(x, params), x


def init_linear_gate(
    dim: int,
    num_experts: int,
    *,
    std: float | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw the weights of a linear gate from a normal distribution.

    Args:
        dim: D.
        num_experts: E.
        std: standard deviation; None takes 1 / sqrt(D).
        generator: of the draw; None takes torch's global one.
        device: as in torch.empty.
        dtype: as in torch.empty.

    Returns:
        (D, E).

    Example:
        >>> init_linear_gate(16, 4).shape
        torch.Size([16, 4])
    """
    w = torch.empty(dim, num_experts, device=device, dtype=dtype)
    return w.normal_(std=dim**-0.5 if std is None else std, generator=generator)


def check_parts(name: str, params: Any, kind: type[tuple[Tensor, ...]]) -> None:
    """Refuse parameters that lack a tensor that a gate reads: those of another kind of gate.

    Args:
        name: of the gate, for the message.
        params: that it was given.
        kind: the NamedTuple that it takes; anything with its fields will do.

    Raises:
        ValueError: if a field is not there.

    Example:
        >>> from moekit.routing import SoftGateParams
        >>> check_parts("soft_gate", SoftGateParams(torch.ones(4, 6), torch.ones(1)), SoftGateParams)
    """
    lacking = [part for part in kind._fields if not hasattr(params, part)]  # type: ignore[attr-defined]
    if lacking:
        raise ValueError(
            f"{name}: the gate's parameters are {type(params).__name__}, which lack {', '.join(lacking)}; expected "
            f"{kind.__name__}. {_OTHER_GATE.format(name)}"
        )


def check_precision(name: str, logits: Tensor) -> None:
    """Refuse logits in half precision, as every router and every loss does.

    Sums over tokens in float16 are infinite from some thousands on, and near-equal experts are equal in either.

    Args:
        name: of the caller, for the message.
        logits: of any shape.

    Raises:
        ValueError: if they are neither float32 nor float64.

    Example:
        >>> check_precision("top_k", torch.zeros(2, 3))
        >>> check_precision("top_k", torch.zeros(2, 3, dtype=torch.float16))
        Traceback (most recent call last):
        ValueError: top_k: logits are in torch.float16; expected float32 (or float64), in which every choice, weight \
and loss is computed. Let the gate compute in float32, as linear_gate does, inside autocast too (`with \
torch.autocast(x.device.type, enabled=False): return x.float() @ w.float()`), or pass logits.float().
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: logits are in {logits.dtype}; expected float32 (or float64), in which every choice, weight and "
            f"loss is computed. Let the gate compute in float32, as linear_gate does, inside autocast too (`with "
            f"torch.autocast(x.device.type, enabled=False): return x.float() @ w.float()`), or pass logits.float()."
        )


_OTHER_GATE = (
    "A module keeps the parameters of the recipe that it was made of: make a new MoE of a recipe with another gate, or "
    "draw the parameters with init_{}."
)


def _check_gate(x: Tensor, w: Tensor) -> None:
    if not isinstance(w, Tensor):
        raise ValueError(
            f"linear_gate: the gate's parameters are {type(w).__name__}; expected a tensor (D, E). "
            f"{_OTHER_GATE.format('linear_gate')}"
        )
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(
            f"linear_gate: x has shape {tuple(x.shape)} and w {tuple(w.shape)}; expected (T, D) and (D, E) with the "
            f"same D. Flatten x to (tokens, model dimension) first, and store the gate as (D, E)."
        )


def noisy(logits: Logits) -> Tensor:
    """Return the logits that a router decides by, from a gate with or without noise.

    Args:
        logits: (T, E), or ``NoisyLogits`` of (T, E).

    Returns:
        (T, E): those with noise, where there is any.

    Example:
        >>> z = torch.zeros(2, 3)
        >>> noisy(NoisyLogits(z + 1, z, std=z)).mean(), noisy(z) is z
        (tensor(1.), True)
    """
    return logits.logits if isinstance(logits, NoisyLogits) else logits


def clean(logits: Logits) -> Tensor:
    """Return the logits without noise, from a gate with or without noise.

    Args:
        logits: (T, E), or ``NoisyLogits`` of (T, E).

    Returns:
        (T, E): what losses and statistics read.

    Example:
        >>> z = torch.zeros(2, 3)
        >>> clean(NoisyLogits(z + 1, z, std=z)).mean(), clean(z) is z
        (tensor(0.), True)
    """
    return logits.clean if isinstance(logits, NoisyLogits) else logits
