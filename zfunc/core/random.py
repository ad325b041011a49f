# SPDX-License-Identifier: Apache-2.0
r"""Randomness as an argument: counter-based, so masks do not depend on the mesh.

A key is an int64 tensor, 0-d or one per sample. Numbers are a hash (the finalizer of
SplitMix64; Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)
of the key and a counter: no generator, no state, the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical: int64 shifts keep the sign


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def fold_in(key: torch.Tensor, data: int | torch.Tensor) -> torch.Tensor:
    """A new key from a key and an integer (a layer, a step, a sample's index).

    Broadcasts: a 0-d key and data of shape [B] give one key per sample.

    Example:
      >>> fold_in(torch.tensor(0), torch.arange(3)).shape
      torch.Size([3])
    """
    wide = data.to(torch.int64) if isinstance(data, torch.Tensor) else data
    offset = wide * _GOLDEN + _MIX_1
    if isinstance(offset, int):  # wrap around as tensors do
        offset = (offset + 2**63) % 2**64 - 2**63
    return _mix(_mix(key + _GOLDEN) ^ offset)


def uniform(key: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """float32 numbers in [0, 1) of shape ``key.shape + shape``, 24 random bits each.

    Example:
      >>> bool((uniform(torch.tensor(1), (4,)) < 1).all())
      True
    """
    count = 1
    for d in shape:
        count *= d
    counter = torch.arange(count, device=key.device).reshape(tuple(shape))
    bits = fold_in(key.reshape((*key.shape, *[1] * len(shape))), counter)
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def dropout(key: torch.Tensor, x: torch.Tensor, rate: float) -> torch.Tensor:
    r"""Zero each element with probability ``rate`` and scale the rest by 1/(1-rate).

    ``key`` has the leading dims of ``x``: with one key per sample, a sample's mask is
    the same on every mesh and microbatch.

    Example:
      >>> keys = fold_in(torch.tensor(0), torch.arange(2))
      >>> dropout(keys, torch.ones(2, 3), 0.0)
      tensor([[1., 1., 1.],
              [1., 1., 1.]])
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout rate must be in [0, 1), got {rate}")
    if rate == 0.0:
        return x
    if key.shape != x.shape[: key.dim()]:
        raise ValueError(
            f"dropout: the key has shape {tuple(key.shape)}, which is not how "
            f"{tuple(x.shape)} begins: give one key per sample."
        )
    keep = uniform(key, x.shape[key.dim() :]) >= rate
    return torch.where(keep, x / (1.0 - rate), torch.zeros((), dtype=x.dtype))
