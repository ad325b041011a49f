# SPDX-License-Identifier: Apache-2.0
r"""Sigmoid, SiLU and GELU with their slopes, as functions that kernels call.

Each takes float32 or float64 values and is finite for every finite argument. Where an
argument is infinite it gives the limit: a gate of :math:`-\infty` is a shut gate, 0.
Beyond :math:`\pm 10^4` every one of them is its limit to the last bit already, so that
is where arguments are cut; NaN stays NaN.
"""

from typing import Final

import triton
import triton.language as tl

LIMIT: Final = tl.constexpr(1e4)
_SQRT_HALF: Final = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2PI: Final = tl.constexpr(0.3989422804014327)
_TWICE_SQRT_2_OVER_PI: Final = tl.constexpr(1.5957691216057308)
_CUBIC: Final = tl.constexpr(0.044715)


@triton.jit
def _cut(x):
    """``x`` cut from below, and ``x`` cut from both sides."""
    low = tl.where(x < -LIMIT, -LIMIT, x)
    return low, tl.where(low > LIMIT, LIMIT, low)


@triton.jit
def sigmoid(x):
    """The sigmoid of ``x`` and of ``-x``, both to relative accuracy, no overflow."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    small = small * large
    positive = x >= 0
    return tl.where(positive, large, small), tl.where(positive, small, large)


@triton.jit
def silu(x):
    """``x * sigmoid(x)`` and its slope."""
    low, cut = _cut(x)
    open_, shut = sigmoid(cut)
    return low * open_, open_ * (1.0 + cut * shut)


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """``x`` times the normal distribution function (or its tanh form), and its slope.

    The tanh form is a sigmoid: ``(1 + tanh(z)) / 2`` is ``sigmoid(2 z)``.
    """
    low, cut = _cut(x)
    square = cut * cut
    if TANH:
        cubic = square * _CUBIC
        below, above = sigmoid(cut * _TWICE_SQRT_2_OVER_PI * (1.0 + cubic))
        density = below * above * _TWICE_SQRT_2_OVER_PI * (1.0 + 3.0 * cubic)
    else:
        below = 0.5 + 0.5 * tl.math.erf(cut * _SQRT_HALF)
        density = tl.exp(-0.5 * square) * _INVERSE_SQRT_2PI
    return low * below, below + cut * density
