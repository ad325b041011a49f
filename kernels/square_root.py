# SPDX-License-Identifier: Apache-2.0
"""A square root with the same bits everywhere: the nearest number to the exact one.

IEEE arithmetic asks for it, and CUDA, Triton and compiled C++ give it. torch on a CPU
calls MKL, which on some processors is off by one unit in the last place in a sixth of
all cases.
"""

from typing import Final

import torch
from torch import Tensor

_SPLIT: Final = 2.0**27 + 1  # Veltkamp's, for float64
_TINY: Final = 2.0**-400  # roots below this are left as torch computes them


def square_root(x: Tensor) -> Tensor:
    r"""The square root, rounded to nearest.

    In float32 on a CPU it is computed in float64 and rounded: the root of a number of
    24 bits is at least :math:`2^{-51}` of itself away from where rounding changes, more
    than the error of a float64 root. In float64 it is one step of Newton's method on
    torch's root, whose square is computed without error.

    Args:
      x: A float32 or float64 tensor.

    Returns:
      A tensor like ``x``.

    Examples:
      >>> square_root(torch.tensor([4.0, 0.0, 2.0]))
      tensor([2.0000, 0.0000, 1.4142])

    References:
      Dekker, "A floating-point technique for extending the available precision", 1971.

    Differs from:
      ``torch.sqrt``, on a CPU, in the last bit.
    """
    if x.device.type != "cpu":
        return x.sqrt()
    if x.dtype == torch.float32:
        return x.double().sqrt().float()
    root = x.sqrt()
    scaled = root * _SPLIT
    high = scaled - (scaled - root)
    low = root - high
    square = root * root
    error = (high * high - square) + 2 * high * low + low * low
    correction = ((x - square) - error) / (2 * root)
    sure = correction.isfinite() & (root > _TINY)
    return torch.where(sure, root + correction, root)
