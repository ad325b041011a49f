# SPDX-License-Identifier: Apache-2.0
"""Momentum: a decaying sum of the updates."""

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, pytree, tree_map
from zfunc.optim.base import (
    LEAF,
    GradientTransformation,
    check_moments,
    new_count,
    widen,
    zeros_wide,
)
from zfunc.optim.checks import check_number
from zfunc.optim.schedule_values import check_factor, factor_at, rounded
from zfunc.optim.schedules import Schedule


@pytree
class TraceMoments:
    """What ``trace`` remembers: the number of updates so far, and the trace of them.

    Examples:
      >>> TraceMoments(torch.tensor(0), {"w": torch.zeros(1)}).count
      tensor(0)
    """

    count: Tensor
    trace: PyTree


def trace(
    momentum: float | Schedule, *, nesterov: bool = False, dampening: float = 0.0
) -> GradientTransformation:
    r"""Replace each update by a decaying sum of all updates so far.

    From :math:`b_0 = 0`:

    .. math::
      b_t &= \mu b_{t-1} + d_t u_t, \quad d_1 = 1, \; d_{t>1} = 1 - \text{dampening} \\
      u'_t &= u_t + \mu b_t \text{ if nesterov, else } b_t

    With a schedule of :math:`\mu`, update t uses its value at t - 1, the number of
    updates before.

    Args:
      momentum: The factor :math:`\mu`, at least 0, or a schedule.
      nesterov: Look ahead along the new trace.
      dampening: What the updates after the first are reduced by.

    Returns:
      A transformation with ``TraceMoments``: one buffer like the parameters, in
      float32 at least.

    Raises:
      TypeError: A hyper-parameter of the wrong kind; or (from ``update``) a schedule
        that returns something else than a number or a 0-d tensor.
      ValueError: ``momentum`` is negative; ``nesterov`` without momentum or with
        dampening; dampening outside of [0, 1], or without momentum.
      StructureError: (from ``update``) the moments of something else.

    Examples:
      >>> tx, p, g = trace(0.9), torch.zeros(1), torch.ones(1)
      >>> first, moments = tx.update(g, tx.init(p), p)
      >>> first, tx.update(g, moments, p)[0]
      (tensor([1.]), tensor([1.9000]))

    References:
      Sutskever et al., `On the importance of initialization and momentum
      <https://proceedings.mlr.press/v28/sutskever13.html>`_, 2013, with the learning
      rate moved out of the trace.

    Differs from:
      optax's ``trace`` has no dampening. The count is kept for every dampening, so
      that the structure of the moments does not depend on a hyper-parameter.
    """
    momentum = check_factor("trace: momentum", momentum, instead="momentum=0.9")
    damp = check_trace(momentum, nesterov, dampening)

    def init(params: PyTree) -> PyTree:
        return TraceMoments(new_count(params), zeros_wide(params))

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_moments("trace", TraceMoments(LEAF, updates), moments)
        gain = 1.0 - damp * (moments.count > 0).to(torch.float64)
        mu = factor_at("trace: momentum", momentum, moments.count)
        traces = tree_map(
            lambda b, u: rounded(mu, b.dtype) * b + gain.to(b.dtype) * u.to(b.dtype),
            moments.trace,
            updates,
        )
        after = TraceMoments(moments.count + 1, traces)
        if not nesterov:
            return traces, after
        return tree_map(
            lambda u, b: widen(u) + rounded(mu, b.dtype) * b, updates, traces
        ), after

    return GradientTransformation(init, update, leafwise=True)


def check_trace(momentum: float | Schedule, nesterov: bool, dampening: float) -> float:
    """The dampening, if it and ``nesterov`` fit the momentum.

    Args:
      momentum: The factor, or a schedule.
      nesterov: Whether to look ahead.
      dampening: What the updates after the first are reduced by.

    Raises:
      TypeError: ``nesterov`` is no bool, ``dampening`` no number.
      ValueError: They do not fit.

    Examples:
      >>> check_trace(0.9, False, 0)
      0.0
    """
    damp = check_number("trace: dampening", dampening, instead="dampening=0.0")
    if damp > 1:
        raise ValueError(
            f"trace: dampening is {dampening!r}, expected a number in [0, 1]; type for "
            "example dampening=0.0"
        )
    if not isinstance(nesterov, bool):
        raise TypeError(
            f"trace: nesterov is a {type(nesterov).__name__}, expected True or False"
        )
    if nesterov and (momentum == 0 or damp != 0):
        raise ValueError(
            f"trace: nesterov with momentum={momentum!r} and dampening={dampening!r}, "
            "expected momentum > 0 and no dampening; type for example "
            "momentum=0.9, nesterov=True"
        )
    if damp and momentum == 0:
        raise ValueError(
            f"trace: dampening={dampening!r} has no effect without momentum; type for "
            "example momentum=0.9, or leave dampening out"
        )
    return damp
