# SPDX-License-Identifier: Apache-2.0
"""Lion's direction: the sign of an interpolated momentum."""

from torch import Tensor

from zfunc.core.tree import PyTree, check_floating, pytree, tree_map
from zfunc.optim.base import (
    GradientTransformation,
    check_moments,
    zeros_wide,
)
from zfunc.optim.checks import check_number


@pytree
class ScaleByLionMoments:
    """What ``scale_by_lion`` remembers: a running mean of the updates.

    Examples:
      >>> import torch
      >>> scale_by_lion().init({"w": torch.ones(1, dtype=torch.bfloat16)}).mu
      {'w': tensor([0.])}
    """

    mu: PyTree


def scale_by_lion(b1: float = 0.9, b2: float = 0.999) -> GradientTransformation:
    r"""Replace each update by the sign of its mean with the momentum.

    From :math:`\mu_0 = 0`:

    .. math::
      u'_t &= \mathrm{sign}(\beta_1 \mu_{t-1} + (1 - \beta_1) u_t) \\
      \mu_t &= \beta_2 \mu_{t-1} + (1 - \beta_2) u_t

    Args:
      b1: :math:`\beta_1` in [0, 1): what the momentum weighs in the update.
      b2: :math:`\beta_2` in [0, 1): the decay of the momentum.

    Returns:
      A transformation with ``ScaleByLionMoments``: one buffer like the parameters, in
      float32 at least.

    Raises:
      TypeError: A hyper-parameter that is not a number.
      ValueError: One out of its range.
      StructureError: (from ``update``) the moments of something else.

    Laws:
      u' is -1, 0 or 1 everywhere, and 0 where all updates were 0: padding stays zero.
      A factor that all updates share changes nothing.

    Examples:
      >>> import torch
      >>> tx, p = scale_by_lion(), torch.zeros(3)
      >>> tx.update(torch.tensor([3.0, -0.1, 0.0]), tx.init(p), p)[0]
      tensor([ 1., -1.,  0.])

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023, algorithm 2.
    """
    b1 = check_number("scale_by_lion: b1", b1, high=1.0, instead="b1=0.9")
    b2 = check_number("scale_by_lion: b2", b2, high=1.0, instead="b2=0.999")

    def init(params: PyTree) -> PyTree:
        check_floating(params, "params")
        return ScaleByLionMoments(zeros_wide(params))

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_moments("scale_by_lion", ScaleByLionMoments(updates), moments)

        def direction(m: Tensor, u: Tensor) -> Tensor:
            return (b1 * m + (1 - b1) * u.to(m.dtype)).sign()

        def mean(m: Tensor, u: Tensor) -> Tensor:
            return b2 * m + (1 - b2) * u.to(m.dtype)

        after = ScaleByLionMoments(tree_map(mean, moments.mu, updates))
        return tree_map(direction, moments.mu, updates), after

    return GradientTransformation(init, update, leafwise=True)
