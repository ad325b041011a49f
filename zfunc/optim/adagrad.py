# SPDX-License-Identifier: Apache-2.0
"""Adagrad."""

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, check_floating, pytree, tree_map
from zfunc.optim.base import (
    GradientTransformation,
    chain,
    check_moments,
    zeros_wide,
)
from zfunc.optim.checks import check_number
from zfunc.optim.decay import add_decayed_weights
from zfunc.optim.schedules import (
    Schedule,
    as_schedule,
    scale_by_learning_rate,
    value_at,
)


@pytree
class ScaleByAdagradMoments:
    """What ``scale_by_adagrad`` remembers: the sum of the squares of all updates.

    Examples:
      >>> scale_by_adagrad().init({"w": torch.ones(1)}).total
      {'w': tensor([0.])}
    """

    total: PyTree


def scale_by_adagrad(
    initial_accumulator_value: float = 0.0, eps: float = 1e-10
) -> GradientTransformation:
    r"""Divide each update by the root of the sum of the squares of all so far.

    From :math:`s_0 = 0`, with the initial value a:

    .. math::
      s_t &= s_{t-1} + u_t^2 \\
      u'_t &= \frac{u_t}{\sqrt{a + s_t} + \epsilon}

    Args:
      initial_accumulator_value: a, at least 0.
      eps: :math:`\epsilon`, at least 0; in units of the gradient.

    Returns:
      A transformation with ``ScaleByAdagradMoments``: one buffer like the parameters,
      in float32 at least.

    Raises:
      TypeError: A hyper-parameter that is not a number.
      ValueError: One out of its range.
      StructureError: (from ``update``) the moments of something else.

    Laws:
      Where the root is 0, so is u', also with ``eps=0``: padding stays zero.

    Examples:
      >>> tx, p = scale_by_adagrad(), torch.zeros(2)
      >>> _, moments = tx.update(torch.tensor([3.0, 0.0]), tx.init(p), p)
      >>> tx.update(torch.tensor([4.0, 0.0]), moments, p)[0]
      tensor([0.8000, 0.0000])

    References:
      Duchi, Hazan, Singer, `Adaptive Subgradient Methods
      <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011.

    Differs from:
      ``torch.optim`` and optax keep :math:`a + s_t`. Here a is added where it is used:
      what is kept starts at zero, as the padding of uneven leaves has to. torch gives
      NaN where ``eps=0`` and all gradients were 0.
    """
    start = check_number(
        "scale_by_adagrad: initial_accumulator_value",
        initial_accumulator_value,
        instead="initial_accumulator_value=0.1",
    )
    eps = check_number("scale_by_adagrad: eps", eps, instead="eps=1e-10")

    def init(params: PyTree) -> PyTree:
        check_floating(params, "params")
        return ScaleByAdagradMoments(zeros_wide(params))

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_moments("scale_by_adagrad", ScaleByAdagradMoments(updates), moments)
        totals = tree_map(
            lambda s, u: s + u.to(s.dtype).square(), moments.total, updates
        )

        def scaled(s: Tensor, u: Tensor) -> Tensor:
            root = (s + start).sqrt()
            ratio = u.to(s.dtype) / (root + eps)
            return ratio if eps else torch.where(root == 0, root, ratio)

        return tree_map(scaled, totals, updates), ScaleByAdagradMoments(totals)

    return GradientTransformation(init, update, leafwise=True)


def adagrad(
    learning_rate: float | Schedule,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
) -> GradientTransformation:
    r"""Adagrad, with a rate that falls as one over the step if it is told to.

    .. math::
      p_{t+1} = p_t - \frac{\eta_t}{1 + \kappa t} \mathrm{adagrad}_t(g_t + \lambda p_t)

    where t counts the updates before this one. The weight decay is coupled. Memory:
    one float32 moment, 4 bytes per parameter.

    Args:
      learning_rate: :math:`\eta`, at least 0, or a schedule.
      lr_decay: :math:`\kappa`, at least 0.
      weight_decay: :math:`\lambda`, at least 0.
      initial_accumulator_value: What the sums of squares start from, at least 0.
      eps: Added to the denominator, at least 0.

    Returns:
      The optimizer: ``chain(add_decayed_weights, scale_by_adagrad,
      scale_by_learning_rate)``.

    Raises:
      TypeError: A hyper-parameter of the wrong kind.
      ValueError: One out of its range.

    Laws:
      ``torch.optim.Adagrad`` to rounding, at every step.

    Examples:
      >>> from zfunc.optim import apply_updates
      >>> tx, p = adagrad(0.1), torch.ones(2)
      >>> updates, moments = tx.update(torch.tensor([5.0, -5.0]), tx.init(p), p)
      >>> apply_updates(p, updates)
      tensor([0.9000, 1.1000])

    References:
      Duchi, Hazan, Singer, `Adaptive Subgradient Methods
      <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011.

    Differs from:
      ``lr_decay`` multiplies a schedule too; torch has no schedule inside. No
      ``maximize`` and no sparse gradients.
    """
    return chain(
        add_decayed_weights(weight_decay),
        scale_by_adagrad(initial_accumulator_value, eps),
        scale_by_learning_rate(_falling(learning_rate, lr_decay)),
    )


def _falling(learning_rate: float | Schedule, lr_decay: float) -> Schedule:
    schedule = as_schedule(learning_rate)
    decay = check_number("adagrad: lr_decay", lr_decay, instead="lr_decay=0.0")

    def rate(count: Tensor) -> Tensor:
        now = value_at("the learning-rate schedule", schedule, count)
        return now / (1 + decay * count.to(torch.float64))

    return rate if decay else schedule
