# SPDX-License-Identifier: Apache-2.0
"""RMSprop."""

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, check_floating, pytree, tree_map
from zfunc.optim.base import (
    GradientTransformation,
    chain,
    check_moments,
    identity,
    zeros_wide,
)
from zfunc.optim.checks import check_number
from zfunc.optim.decay import add_decayed_weights
from zfunc.optim.schedules import Schedule, scale_by_learning_rate
from zfunc.optim.trace import trace


@pytree
class ScaleByRmsMoments:
    """What ``scale_by_rms`` remembers: a mean of squares, and if centered a mean.

    ``mu`` is ``()`` where it is not centered.

    Examples:
      >>> scale_by_rms().init({"w": torch.ones(1)})
      ScaleByRmsMoments(mu=(), nu={'w': tensor([0.])})
    """

    mu: PyTree
    nu: PyTree


def scale_by_rms(
    alpha: float = 0.99, eps: float = 1e-8, *, centered: bool = False
) -> GradientTransformation:
    r"""Divide each update by the root of a running mean of the squares.

    From :math:`\mu_0 = \nu_0 = 0`:

    .. math::
      \nu_t &= \alpha \nu_{t-1} + (1 - \alpha) u_t^2 \\
      u'_t &= \frac{u_t}{\sqrt{\nu_t} + \epsilon}

    Centered, the mean's square is taken off: with
    :math:`\mu_t = \alpha \mu_{t-1} + (1 - \alpha) u_t` the root is that of
    :math:`\max(\nu_t - \mu_t^2, 0)`, an estimate of the variance.

    Args:
      alpha: :math:`\alpha` in [0, 1).
      eps: :math:`\epsilon`, at least 0; in units of the gradient.
      centered: Divide by the standard deviation; a second buffer.

    Returns:
      A transformation with ``ScaleByRmsMoments``: one buffer like the parameters, or
      two, in float32 at least.

    Raises:
      TypeError: A hyper-parameter of the wrong kind.
      ValueError: One out of its range.
      StructureError: (from ``update``) the moments of something else.

    Laws:
      Where ``eps=0`` and the root is 0, so is u': padding stays zero.

    Examples:
      >>> tx, p = scale_by_rms(alpha=0.75), torch.zeros(2)
      >>> tx.update(torch.tensor([3.0, 0.0]), tx.init(p), p)[0]
      tensor([2., 0.])

    References:
      Tieleman and Hinton, `Lecture 6.5
      <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_,
      2012; Graves, `Generating Sequences <https://arxiv.org/abs/1308.0850>`_, 2013,
      equations 38 to 42 (centered).

    Differs from:
      ``torch.optim`` gives NaN where rounding makes :math:`\nu_t < \mu_t^2`, as
      constant gradients do, and where ``eps=0`` and all gradients were 0.
    """
    alpha = check_number("scale_by_rms: alpha", alpha, high=1.0, instead="alpha=0.99")
    eps = check_number("scale_by_rms: eps", eps, instead="eps=1e-8")
    if not isinstance(centered, bool):
        raise TypeError(
            f"scale_by_rms: centered is a {type(centered).__name__}, expected True or "
            "False"
        )

    def init(params: PyTree) -> PyTree:
        check_floating(params, "params")
        mu = zeros_wide(params) if centered else ()
        return ScaleByRmsMoments(mu, zeros_wide(params))

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        expected = ScaleByRmsMoments(updates if centered else (), updates)
        check_moments("scale_by_rms", expected, moments)
        nu = tree_map(
            lambda n, u: alpha * n + (1 - alpha) * u.to(n.dtype).square(),
            moments.nu,
            updates,
        )

        def scaled(square: Tensor, u: Tensor) -> Tensor:
            root = square.sqrt()
            ratio = u.to(root.dtype) / (root + eps)
            return ratio if eps else torch.where(root == 0, root, ratio)

        if not centered:
            return tree_map(scaled, nu, updates), ScaleByRmsMoments((), nu)
        mu = tree_map(
            lambda m, u: alpha * m + (1 - alpha) * u.to(m.dtype), moments.mu, updates
        )
        variance = tree_map(lambda n, m: (n - m.square()).clamp(min=0.0), nu, mu)
        return tree_map(scaled, variance, updates), ScaleByRmsMoments(mu, nu)

    return GradientTransformation(init, update, leafwise=True)


def rmsprop(
    learning_rate: float | Schedule,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
) -> GradientTransformation:
    r"""RMSprop: :math:`p_{t+1} = p_t - \eta_t b_t(\mathrm{rms}_t(g_t + \lambda p_t))`.

    :math:`b_t` is ``trace``, or nothing without momentum. The weight decay is coupled.
    Memory: one float32 moment, 4 bytes per parameter; 4 more with momentum, and 4 more
    if centered.

    Args:
      learning_rate: :math:`\eta`, at least 0, or a schedule.
      alpha: Decay of the mean square, in [0, 1).
      eps: Added to the denominator, at least 0.
      weight_decay: :math:`\lambda`, at least 0.
      momentum: At least 0; 0 keeps no buffer.
      centered: Divide by the standard deviation instead.

    Returns:
      The optimizer: ``chain(add_decayed_weights, scale_by_rms, trace,
      scale_by_learning_rate)``.

    Raises:
      TypeError: A hyper-parameter of the wrong kind.
      ValueError: One out of its range.

    Laws:
      ``torch.optim.RMSprop`` to rounding, at every step.

    Examples:
      >>> from zfunc.optim import apply_updates
      >>> tx, p = rmsprop(0.1, alpha=0.75), torch.ones(2)
      >>> updates, moments = tx.update(torch.tensor([5.0, -5.0]), tx.init(p), p)
      >>> apply_updates(p, updates)
      tensor([0.8000, 1.2000])

    References:
      Tieleman and Hinton, `Lecture 6.5
      <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_,
      2012.

    Differs from:
      optax's ``rmsprop`` decays by 0.9 and puts ``eps`` inside the root by default. No
      ``maximize``.
    """
    momentum = check_number("rmsprop: momentum", momentum, instead="momentum=0.9")
    return chain(
        add_decayed_weights(weight_decay),
        scale_by_rms(alpha, eps, centered=centered),
        trace(momentum) if momentum else identity(),
        scale_by_learning_rate(learning_rate),
    )
