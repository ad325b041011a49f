# SPDX-License-Identifier: Apache-2.0
"""What elementwise kernels are drawn from, and measured with."""

import torch
from hypothesis import strategies as st

from tests.kernels.checks import EPS

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
SHAPES = st.sampled_from(
    [(0,), (1,), (3, 0, 2), (7, 3), (127,), (128, 8), (2, 3, 5), (1023,), (1025,)]
)
LAYOUTS = st.sampled_from(["contiguous", "transposed", "stepped", "expanded"])
EXTREMES = (-torch.inf, -6e4, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4, 6e4, torch.inf)


def laid(x, layout):
    """``x`` with other strides; "expanded" repeats its first element along dim 0."""
    if layout == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x.flip(0)
    if layout == "stepped":
        return torch.stack([x, x], -1)[..., 0]
    if layout == "expanded" and x.dim() > 0 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


def normal(shape, dtype, scale=3.0):
    return torch.randn(shape, dtype=torch.float64).mul(scale).to(dtype)


def wide_eps(dtype):
    """The unit roundoff of the arithmetic on a dtype."""
    return EPS[torch.promote_types(dtype, torch.float32)]


def within(got, exact, bound):
    """Within a bound of float64 per element, and one rounding of the dtype.

    The interpreter truncates to bfloat16, which is two unit roundoffs.
    """
    assert got.shape == exact.shape
    tiny = torch.finfo(got.dtype).smallest_normal
    room = bound + 2 * EPS[got.dtype] * exact.abs() + tiny
    error = (got.double() - exact).abs()
    assert bool((error <= room).all()), (error / room).max()
