# SPDX-License-Identifier: Apache-2.0
"""LAMB in torch, tensor by tensor: what ``kernels/lamb.py`` computes in two passes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .global_norm import square_sums_reference
from .square_root import square_root
from .update_lists import Adam, Options, divisor, widen


class LambMoments(NamedTuple):
    """What ``lamb_moments`` returns.

    Attributes:
      mu: The new means.
      nu: The new mean squares.
      sums: [tensors, 2]: sums of squares of the parameters, and of their updates.
    """

    mu: list[Tensor]
    nu: list[Tensor]
    sums: Tensor


class LambParams(NamedTuple):
    """What ``lamb_apply`` returns.

    Attributes:
      params: New parameters, in their dtypes.
      copies: The new parameters in ``copy_dtype``; empty without one.
    """

    params: list[Tensor]
    copies: list[Tensor]


def _direction(p: Tensor, m: Tensor, n: Tensor, decay: float, adam: Adam) -> Tensor:
    """Adam's update and the decay."""
    size = square_root(n / divisor(adam.weight2, adam.weight2_at, n)) + adam.eps
    u = m / divisor(adam.weight1, adam.weight1_at, m) / size
    u = u if adam.eps else torch.where(m == 0, m, u)
    return u + decay * widen(p) if decay else u


def lamb_moments_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    options: Options,
    adam: Adam,
) -> LambMoments:
    """Pass 1, tensor by tensor.

    Args:
      params: Floating tensors.
      grads: Like them.
      mu: Like them, in float32 (float64 for float64).
      nu: Like ``mu``.
      options: What all updates have.
      adam: What this one has.
    """
    new_mu, new_nu, updates = [], [], []
    rows = zip(params, grads, mu, nu, options.weight_decay, strict=True)
    for p, g, m, n, decay in rows:
        g = options.scaled(g)
        new_mu.append(options.chosen(adam.b1 * m + (1 - adam.b1) * g, m))
        new_nu.append(options.chosen(adam.b2 * n + (1 - adam.b2) * g.square(), n))
        updates.append(_direction(p, new_mu[-1], new_nu[-1], decay, adam))
    if not updates:
        return LambMoments([], [], torch.zeros(0, 2))
    sums = [square_sums_reference(some).sums for some in (params, updates)]
    return LambMoments(new_mu, new_nu, torch.stack(sums, 1))


def trust_ratios_reference(sums: Tensor, max_coeff: float, min_coeff: float) -> Tensor:
    """The ratios of norms, in bounds.

    Args:
      sums: [tensors, 2].
      max_coeff: The largest.
      min_coeff: The least.
    """
    p, u = square_root(sums).unbind(1)
    none = (p == 0) | (u == 0)
    return torch.where(none, 1.0, (p / u).clamp(min_coeff, max_coeff))


def lamb_apply_reference(
    params: Sequence[Tensor],
    mu: Sequence[Tensor],
    nu: Sequence[Tensor],
    ratios: Tensor,
    options: Options,
    adam: Adam,
) -> LambParams:
    """Pass 2, tensor by tensor.

    Args:
      params: Floating tensors.
      mu: The new means.
      nu: The new mean squares.
      ratios: [tensors].
      options: What all updates have.
      adam: What this one has.
    """
    new = []
    rows = zip(params, mu, nu, options.weight_decay, ratios, strict=True)
    for p, m, n, decay, phi in rows:
        u = _direction(p, m, n, decay, adam)
        new.append(options.moved(p, u * phi.to(u.dtype)))
    return LambParams(new, options.copied(new))
