# SPDX-License-Identifier: Apache-2.0
r"""Random bits as a hash of a key and a counter, in torch and in Triton.

The hash is the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", 2014), over the key and then over the counter: the
numbers of ``zfunc.core.random``, bit for bit.
"""

import math
import struct
from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

GOLDEN: Final = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1: Final = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2: Final = tl.constexpr(0x94D049BB133111EB)


def threshold(rate: float) -> int:
    """How many of the numbers ``i / 2**24`` are below the float32 of a rate.

    A uniform number of 24 bits is kept if it is not below: a comparison of integers.

    Args:
      rate: In [0, 1).

    Examples:
      >>> threshold(0.5) == 2**23, threshold(0.0)
      (True, 0)
    """
    return math.ceil(struct.unpack("f", struct.pack("f", rate))[0] * 2**24)


def keep_mask(key: Tensor, shape: Sequence[int], rate: float) -> Tensor:
    """Which elements dropout keeps, of shape ``key.shape + shape``.

    Args:
      key: int64, any shape.
      shape: The elements of each key.
      rate: The share that is dropped.

    Examples:
      >>> keep_mask(torch.tensor(1), (4,), 0.1)
      tensor([False,  True,  True, False])
    """
    counter = torch.arange(math.prod(shape), device=key.device).reshape(tuple(shape))
    golden, mix_1 = _signed(GOLDEN.value), _signed(MIX_1.value)
    keys = _mixed(key.reshape(*key.shape, *(1 for _ in shape)) + golden)
    bits = _mixed(keys ^ (counter * golden + mix_1))
    return _shifted(bits, 40) >= threshold(rate)


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(MIX_1.value)
    z = (z ^ _shifted(z, 27)) * _signed(MIX_2.value)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # int64 shifts keep the sign


def _signed(z: int) -> int:
    """The int64 of the bits of a uint64 with its first bit set."""
    return z - 2**64


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * MIX_1
    return (z ^ (z >> 27)) * MIX_2


@triton.jit
def is_kept(key, counter, threshold):
    """``keep_mask`` of int64 keys and counters, which broadcast, by ``threshold``.

    The hash's last step changes the lower 33 bits alone, and the number is made of the
    upper 24.
    """
    z = _mix(key.to(tl.uint64) + GOLDEN)
    z = z ^ (z >> 31) ^ (counter.to(tl.uint64) * GOLDEN + MIX_1)
    return (_mix(z) >> 40).to(tl.int32) >= threshold
