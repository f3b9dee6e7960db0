"""Gates: tokens to router logits."""

import torch
from torch import Tensor


def linear_gate(x: Tensor, w: Tensor) -> Tensor:
    """Score every expert for every token, z = x W, in float32 even inside autocast.

    Router logits in half precision flip decisions between near-equal experts and make the z-loss useless, so the
    product is computed in float32 (float64 if ``x`` is float64).

    Causal. No host synchronisation. Deterministic on CUDA.

    Args:
        x: (T, D), any floating dtype.
        w: (D, E).

    Returns:
        (T, E) float32 logits.

    Raises:
        ValueError: if the widths do not match.

    Example:
        >>> linear_gate(torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(3, 4)).dtype
        torch.float32

    References:
        Shazeer et al., Outrageously Large Neural Networks, 2017, section 2, https://arxiv.org/abs/1701.06538
        Fedus et al., Switch Transformers, 2021, section 2.4 (selective precision), https://arxiv.org/abs/2101.03961
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(
            f"linear_gate: x has shape {tuple(x.shape)} and w {tuple(w.shape)}; expected (T, D) and (D, E) with the "
            f"same D. Flatten x to (tokens, model dimension) first, and store the gate as (D, E)."
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ w.to(dtype)
