"""Activations inside kernels: values and derivatives, by a name known when a kernel is compiled."""

import triton
import triton.language as tl

_SIGMOID = tl.constexpr(  # 2^(-x log2 e), and its reciprocal, each one instruction; what is below 2^-126 is 0
    "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000; "
    "rcp.approx.ftz.f32 $0, t; }"
)


@triton.jit
def _sigmoid(x, QUICK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return 1 / (1 + e^-x) of float32: if ``QUICK``, without care for the last bits, and on CUDA alone."""
    if QUICK:
        return tl.inline_asm_elementwise(_SIGMOID, "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.sigmoid(x)


@triton.jit
def _activated(x, NAME: tl.constexpr, QUICK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return f(x) and f'(x), float32."""
    if NAME == "silu":
        gate = _sigmoid(x, QUICK)
        value = x * gate
        return value, gate + value * (1.0 - gate)
    elif NAME == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1, so that x (1 + tanh(z)) / 2 = x sigmoid(2 z)
        gate = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), QUICK)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * gate, gate + x * gate * (1.0 - gate) * slope
    elif NAME == "relu":
        return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)  # NaN stays
    else:
        tl.static_assert(NAME == "relu2", "unknown activation")
        positive = tl.where(x <= 0.0, 0.0, x)  # NaN stays
        return positive * positive, 2.0 * positive


@triton.jit
def units(  # type: ignore[no-untyped-def]
    gate,
    up,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    QUICK: tl.constexpr = False,
):
    """Return hidden units and their derivatives by ``gate`` and by ``up``, which counts only if ``GATED``.

    ``QUICK`` is for results of 16 bits on CUDA: a sigmoid is then right to about 20 bits.
    """
    if ACTIVATION == "clamped_swiglu":
        clamped = tl.where(gate > LIMIT, LIMIT, gate)
        share = _sigmoid(ALPHA * clamped, QUICK)
        value = clamped * share
        slope = tl.where(gate > LIMIT, 0.0, share + ALPHA * value * (1.0 - share))
        factor = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
        return value * factor, slope * factor, tl.where((up > LIMIT) | (up < -LIMIT), 0.0, value)
    else:
        value, slope = _activated(gate, ACTIVATION, QUICK)
        if GATED:
            return value * up, slope * up, value
        else:
            return value, slope, value
