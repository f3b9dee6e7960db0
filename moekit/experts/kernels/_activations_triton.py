"""Activations inside kernels: values and derivatives, by a name known when a kernel is compiled."""

import triton
import triton.language as tl


@triton.jit
def _activated(x, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return f(x) and f'(x), float32."""
    if NAME == "silu":
        gate = tl.sigmoid(x)
        value = x * gate
        return value, gate + value * (1.0 - gate)
    elif NAME == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1, so that x (1 + tanh(z)) / 2 = x sigmoid(2 z)
        gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * gate, gate + x * gate * (1.0 - gate) * slope
    elif NAME == "relu":
        positive = x > 0.0
        return tl.where(positive, x, 0.0), tl.where(positive, 1.0, 0.0)
    else:
        tl.static_assert(NAME == "relu2", "unknown activation")
        positive = tl.where(x > 0.0, x, 0.0)
        return positive * positive, 2.0 * positive


@triton.jit
def units(  # type: ignore[no-untyped-def]
    gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr
):
    """Return hidden units and their derivatives by ``gate`` and by ``up``, which counts only if ``GATED``."""
    if ACTIVATION == "clamped_swiglu":
        clamped = tl.where(gate > LIMIT, LIMIT, gate)
        share = tl.sigmoid(ALPHA * clamped)
        value = clamped * share
        slope = tl.where(gate > LIMIT, 0.0, share + ALPHA * value * (1.0 - share))
        factor = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
        return value * factor, slope * factor, tl.where((up > LIMIT) | (up < -LIMIT), 0.0, value)
    else:
        value, slope = _activated(gate, ACTIVATION)
        if GATED:
            return value * up, slope * up, value
        else:
            return value, slope, value
