"""The activations that follow a norm, and their derivatives, shared by the kernels so that their bits are the same."""

from __future__ import annotations

import triton
import triton.language as tl

from te_nvfp4_cv.ops.triton.ptx import INTERPRETED

# The activations: their places in spec.ACTIVATIONS, from 1 on.
RELU: tl.constexpr = tl.constexpr(1)
SILU: tl.constexpr = tl.constexpr(2)
HARDSWISH: tl.constexpr = tl.constexpr(3)
RELU6: tl.constexpr = tl.constexpr(4)
GELU: tl.constexpr = tl.constexpr(5)
GELU_TANH: tl.constexpr = tl.constexpr(6)
LEAKY_RELU: tl.constexpr = tl.constexpr(7)


@triton.jit
def gelu_gate(u):
    """Return the sigmoid that GELU's tanh form multiplies u with: (1 + tanh(v)) / 2 = sigmoid(2 v)."""
    return tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))  # 2 sqrt(2 / pi)


@triton.jit
def activated(u, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Return the activation of u; ReLU's, too, lets a NaN through, as torch's does."""
    if ACTIVATION == RELU:
        if INTERPRETED:  # NumPy's maximum may be -0
            y = tl.where(u <= 0.0, 0.0, u)
        else:
            y = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == SILU:
        y = u * tl.sigmoid(u)
    elif ACTIVATION == HARDSWISH:
        y = u * tl.minimum(tl.maximum(u * (1.0 / 6.0) + 0.5, 0.0), 1.0)
    elif ACTIVATION == RELU6:
        y = tl.where(u <= 0.0, 0.0, tl.where(u >= 6.0, 6.0, u))
    elif ACTIVATION == GELU:
        y = 0.5 * u * (1.0 + tl.erf(u * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        y = u * gelu_gate(u)
    else:
        y = tl.where(u > 0.0, u, u * SLOPE)
    return y


@triton.jit
def activation_gradient(dy, u, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Return dy times the activation's derivative at u, for all but ReLU, which has its mask."""
    if ACTIVATION == SILU:
        gate = tl.sigmoid(u)
        g = dy * gate * (1.0 + u * (1.0 - gate))
    elif ACTIVATION == HARDSWISH:
        g = tl.where(u <= -3.0, 0.0, tl.where(u < 3.0, dy * (u * (1.0 / 3.0) + 0.5), dy))
    elif ACTIVATION == RELU6:
        g = tl.where((u <= 0.0) | (u >= 6.0), 0.0, dy)
    elif ACTIVATION == GELU:
        density = tl.exp(-0.5 * u * u) * 0.3989422804014327  # 1 / sqrt(2 pi)
        g = dy * (0.5 * (1.0 + tl.erf(u * 0.7071067811865476)) + u * density)
    elif ACTIVATION == GELU_TANH:
        gate = gelu_gate(u)
        inner = 1.5957691216057308 * (1.0 + 0.134145 * u * u)  # 0.134145 = 3 * 0.044715
        g = dy * gate * (1.0 + u * inner * (1.0 - gate))
    else:
        g = tl.where(u > 0.0, dy, dy * SLOPE)
    return g
