"""Rotary position embeddings as pure functions on queries or keys of shape (B, L, H, Dh).

Letters beside the axis legend: B batch, L sequence length, H attention heads, Dh dimension of one head.

Positions are 0 ... L-1 and there is no largest position. Angles are float32 (float64 for float64 inputs) whatever the
autocast dtype. That is better than OpenLM, which rounds its frequencies to the key's dtype first: under bf16 this
leaves 8 bits for the angle, and late positions blur. Models trained there load here unchanged, and get finer angles.
In float32 an angle is off by up to 6e-8 of itself: by 0.0006 at position 10,000, and by 0.06 at a million.

References:
    RoFormer: Enhanced Transformer with Rotary Position Embedding, Su et al., https://arxiv.org/abs/2104.09864, 2021.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moekit.lookup import look_up
from moekit.operators import constant_in_graphs, operator


def rotary_angles(positions: Tensor, head_dim: int, *, base: float = 10_000.0) -> Tensor:
    """Compute the rotation angle of each position and each pair of channels: ``position * base**(-2 i / head_dim)``.

    Args:
        positions: (L,) float; a dtype lower than float32 blurs late positions.
        head_dim: Dh, even.
        base: the wavelength of the slowest pair is just below 2 pi ``base`` positions.

    Returns:
        (L, Dh/2) radians, in the dtype of the positions.

    Raises:
        ValueError: if ``head_dim`` is odd.

    Example:
        >>> rotary_angles(torch.arange(3.0), 2).flatten().tolist()
        [0.0, 1.0, 2.0]
    """
    if head_dim % 2:
        raise ValueError(
            f"rotary rotates pairs of channels, so head_dim must be even, but it is {head_dim}; "
            "choose hidden_dim and n_heads with an even hidden_dim // n_heads"
        )
    channels = torch.arange(0, head_dim, 2, dtype=positions.dtype, device=positions.device)
    return positions[:, None] * base ** (-channels / head_dim)


def _cos_and_sin(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles at positions (L,), each (L, 1, Dh/2)."""
    angles = rotary_angles(positions, head_dim)[:, None]
    return angles.cos(), angles.sin()


# Compilers do not look into an operator. Else they put powers, sines and cosines into every kernel that rotates, and
# compute those of a position and channel anew for each sequence and head. Of fake tensors it makes fake ones itself.
_compiled_cos_and_sin = operator("rotary_cos_and_sin", _cos_and_sin)(_cos_and_sin)


@constant_in_graphs
def _is_exporting() -> bool:
    """Say whether code is made for elsewhere. Asked from traced code, torch 2.11 says so of all that is compiled."""
    return torch.compiler.is_exporting()


def _is_compiled_for(device: torch.device) -> bool:
    """Say whether code is being made for here: what is exported should run where moekit is not."""
    compiles = torch.compiler.is_compiling() and not _is_exporting()
    return compiles and device.type in ("cpu", "cuda")  # those that operators are registered for


def _rotation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles of x (B, L, H, Dh), each (L, 1, Dh/2), in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    compute = _compiled_cos_and_sin if _is_compiled_for(x.device) else _cos_and_sin
    cos, sin = compute(torch.arange(x.shape[1], dtype=wide, device=x.device), x.shape[3])
    return cos, sin


def half_split_rotary(x: Tensor) -> Tensor:
    """Rotate channel i together with channel i + Dh/2, by the token's position. OpenLM's ``rotary``.

    Args:
        x: (B, L, H, Dh), queries or keys; Dh even.

    Returns:
        (B, L, H, Dh), in the dtype of x.

    Raises:
        ValueError: if Dh is odd.

    Example:
        >>> x = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
        >>> rotated = half_split_rotary(x)[0, 1, 0]  # position 1: by one radian
        >>> [round(value, 4) for value in rotated.tolist()]
        [0.5403, 0.8415]
    """
    cos, sin = _rotation(x)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def interleaved_rotary(x: Tensor) -> Tensor:
    """Rotate channel 2i together with channel 2i + 1, by the token's position. OpenLM's ``llama_rotary``.

    The same map as :func:`half_split_rotary` up to a fixed permutation of the channels; weights do not carry over.

    Args:
        x: (B, L, H, Dh), queries or keys; Dh even.

    Returns:
        (B, L, H, Dh), in the dtype of x.

    Raises:
        ValueError: if Dh is odd.

    Example:
        >>> x = torch.randn(1, 3, 2, 4)
        >>> torch.equal(interleaved_rotary(x)[:, 0], x[:, 0])  # position 0 is not rotated
        True
    """
    cos, sin = _rotation(x)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def head_rotary(x: Tensor) -> Tensor:
    """Rotate by the number of the head instead of the position: a bug of early OpenLM, kept for its checkpoints.

    A model with it knows of positions only through the causal mask. Do not train with it.

    Args:
        x: (B, L, H, Dh), queries or keys; Dh even.

    Returns:
        (B, L, H, Dh), in the dtype of x.

    Raises:
        ValueError: if Dh is odd.

    Example:
        >>> x = torch.ones(1, 3, 2, 4)
        >>> torch.equal(head_rotary(x)[:, 0], head_rotary(x)[:, 2])  # all positions alike
        True

    References:
        OpenLM issue 4, https://github.com/mlfoundations/open_lm/issues/4, 2023.
    """
    return half_split_rotary(x.transpose(1, 2)).transpose(1, 2)


def no_rotary(x: Tensor) -> Tensor:
    """Return x (B, L, H, Dh) as it is: no position embedding.

    Args:
        x: (B, L, H, Dh), queries or keys.

    Returns:
        x itself.

    Example:
        >>> x = torch.ones(1, 3, 2, 4)
        >>> no_rotary(x) is x
        True
    """
    return x


ROTARIES: dict[str, Callable[[Tensor], Tensor]] = {
    "rotary": half_split_rotary,
    "llama_rotary": interleaved_rotary,
    "head_rotary": head_rotary,
    "none": no_rotary,
}


def make_rotary(name: str) -> Callable[[Tensor], Tensor]:
    """Return a position embedding by its OpenLM name.

    Args:
        name: ``rotary``, ``llama_rotary``, ``head_rotary`` or ``none``.

    Returns:
        A function from queries or keys (B, L, H, Dh) to the same shape.

    Raises:
        ValueError: if the name is unknown.

    Example:
        >>> make_rotary("rotary").__name__
        'half_split_rotary'
    """
    return look_up(ROTARIES, name, what="position embedding (positional_embedding_type)")
