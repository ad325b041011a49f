# SPDX-License-Identifier: Apache-2.0
"""Adam's direction: a mean of the updates over the root of a mean of their squares."""

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, pytree, tree_map
from zfunc.kernels.square_root import square_root
from zfunc.optim.base import (
    LEAF,
    GradientTransformation,
    check_moments,
    new_count,
    zeros_wide,
)
from zfunc.optim.checks import check_number
from zfunc.optim.schedule_values import check_factor, factor_at, rounded
from zfunc.optim.schedules import Schedule


@pytree
class ScaleByAdamMoments:
    """What ``scale_by_adam`` remembers: the number of updates, and two means of them.

    Examples:
      >>> params = {"w": torch.ones(1, dtype=torch.bfloat16)}
      >>> scale_by_adam().init(params).nu
      {'w': tensor([0.])}
    """

    count: Tensor
    mu: PyTree
    nu: PyTree


def scale_by_adam(
    b1: float | Schedule = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> GradientTransformation:
    r"""Divide a running mean of the updates by the root of a mean of their squares.

    From :math:`\mu_0 = \nu_0 = 0`:

    .. math::
      \mu_t &= \beta_1 \mu_{t-1} + (1 - \beta_1) u_t \\
      \nu_t &= \beta_2 \nu_{t-1} + (1 - \beta_2) u_t^2 \\
      u'_t &= \frac{\mu_t / (1 - \beta_1^t)}{\sqrt{\nu_t / (1 - \beta_2^t)} + \epsilon}

    The root is rounded to nearest, as in the kernels (``square_root``; torch's on a CPU
    may be off by one bit). The bias corrections are computed in float64: in float32,
    :math:`1 - 0.999^t` is wrong by 1e-5 of itself at the first step.

    With a schedule of :math:`\beta_1`, update t uses its value at t - 1, the number of
    updates before, in :math:`\mu_t` and, as if it had always been that, in the bias
    correction :math:`1 - \beta_1^t`. (What has been left out of :math:`\mu_t` is the
    product of all values so far; torch and DeepSpeed use the power of the present one.)

    Args:
      b1: :math:`\beta_1` in [0, 1), or a schedule with such values (a value of 1 or
        more is not noticed: reading it would wait for the device).
      b2: :math:`\beta_2` in [0, 1).
      eps: :math:`\epsilon`, at least 0; in units of the gradient.

    Returns:
      A transformation with ``ScaleByAdamMoments``: two buffers like the parameters, in
      float32 at least.

    Raises:
      TypeError: A hyper-parameter that is not a number; or (from ``update``) a
        schedule that returns something else than a number or a 0-d tensor.
      ValueError: One out of its range.
      StructureError: (from ``update``) the moments of something else.

    Laws:
      With a constant ``b1`` and constant updates u' is their sign (to ``eps``). Where
      all updates were 0, so is u', also with ``eps=0``: padding stays zero. The moments
      of a constant ``b1`` are those of a schedule.

    Examples:
      >>> tx, p = scale_by_adam(), torch.zeros(3)
      >>> tx.update(torch.tensor([3.0, -0.1, 0.0]), tx.init(p), p)[0]
      tensor([ 1., -1.,  0.])

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015, algorithm 1.

    Differs from:
      ``torch.optim`` and optax give NaN where ``eps=0`` and all gradients were 0.
      optax computes the bias corrections in JAX's default float32.
    """
    b1 = check_factor("scale_by_adam: b1", b1, high=1.0, instead="b1=0.9")
    b2 = check_number("scale_by_adam: b2", b2, high=1.0, instead="b2=0.999")
    eps = check_number("scale_by_adam: eps", eps, instead="eps=1e-8")

    def init(params: PyTree) -> PyTree:
        return ScaleByAdamMoments(
            new_count(params), zeros_wide(params), zeros_wide(params)
        )

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        expected = ScaleByAdamMoments(LEAF, updates, updates)
        check_moments("scale_by_adam", expected, moments)
        count = moments.count + 1
        keep = factor_at("scale_by_adam: b1", b1, moments.count)

        def mean(m: Tensor, u: Tensor) -> Tensor:
            new = rounded(1 - keep, m.dtype)
            return rounded(keep, m.dtype) * m + new * u.to(m.dtype)

        mu = tree_map(mean, moments.mu, updates)
        nu = tree_map(
            lambda n, u: b2 * n + (1 - b2) * u.to(n.dtype).square(), moments.nu, updates
        )
        weight1, weight2 = bias_weights(keep, b2, count)

        def scaled(m: Tensor, n: Tensor) -> Tensor:
            root = square_root(n / weight2.to(n.dtype))
            ratio = (m / weight1.to(m.dtype)) / (root + eps)
            return ratio if eps else torch.where(m == 0, m, ratio)

        return tree_map(scaled, mu, nu), ScaleByAdamMoments(count, mu, nu)

    return GradientTransformation(init, update, leafwise=True)


def bias_weights(b1: float | Tensor, b2: float, count: Tensor) -> tuple[Tensor, Tensor]:
    r"""What Adam's two means are divided by, :math:`1 - \beta^t`, in float64.

    Args:
      b1: :math:`\beta_1`, or its value at this update.
      b2: :math:`\beta_2`.
      count: The number t of updates, this one included.

    Examples:
      >>> bias_weights(0.5, 0.75, torch.tensor(1))
      (tensor(0.5000, dtype=torch.float64), tensor(0.2500, dtype=torch.float64))
    """
    updates = count.to(torch.float64)
    return 1 - torch.pow(b1, updates), 1 - torch.pow(b2, updates)
