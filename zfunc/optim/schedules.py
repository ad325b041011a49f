# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules: functions from the step to the rate, on the device."""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, pytree, tree_map
from zfunc.optim.base import (
    LEAF,
    GradientTransformation,
    check_moments,
    new_count,
    widen,
)
from zfunc.optim.checks import check_count, check_number
from zfunc.optim.schedule_values import Schedule as Schedule
from zfunc.optim.schedule_values import as_float, half_cosine
from zfunc.optim.schedule_values import value_at as value_at


def constant(value: float) -> Callable[[Tensor | int], Tensor]:
    r"""The schedule :math:`\eta(t) = v`.

    Args:
      value: v, at least 0.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: ``value`` is not a number.
      ValueError: It is negative.

    Examples:
      >>> constant(0.5)(7)
      tensor(0.5000, dtype=torch.float64)

    Differs from:
      optax returns the Python float.
    """
    rate = check_number("constant: value", value, instead="constant(3e-4)")
    return lambda step: torch.full_like(as_float(step), rate)


def warmup_linear(
    peak: float, warmup_steps: int, total_steps: int, end: float = 0.0
) -> Callable[[Tensor | int], Tensor]:
    r"""Rise linearly from 0 to the peak, then fall linearly to the end.

    With W warm-up and T total steps, and the fraction that is left,
    :math:`r(t) = \mathrm{clip}((T - t) / \max(T - W, 1), 0, 1)`:

    .. math::
      \eta(t) = \begin{cases}
        \text{peak} \cdot t / W & t < W \\
        \text{peak} \cdot r(t) + \text{end} \cdot (1 - r(t)) & t \ge W
      \end{cases}

    Exactly: 0 at step 0 if W > 0 (the first update moves nothing), the peak at step
    W < T, the end at step T and after. The last of T updates uses step T - 1.

    Args:
      peak: The highest rate, at least 0.
      warmup_steps: W, in updates; 0 starts at the peak.
      total_steps: T, in updates; at least 1 and at least W.
      end: The last rate, at least 0.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: A rate that is not a number or a count that is not an int.
      ValueError: A negative rate or count, or ``warmup_steps > total_steps``.

    Examples:
      >>> rate = warmup_linear(1.0, warmup_steps=2, total_steps=6)
      >>> [float(rate(step)) for step in range(8)]
      [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    References:
      Goyal et al., `Accurate, Large Minibatch SGD
      <https://arxiv.org/abs/1706.02677>`_, 2017, section 2.2 (the warm-up).

    Differs from:
      Hugging Face's ``get_linear_schedule_with_warmup`` is the case ``end=0``.
      DeepSpeed's ``WarmupDecayLR`` warms up logarithmically by default.
    """
    return _warmup("warmup_linear", peak, warmup_steps, total_steps, end, lambda r: r)


def warmup_cosine(
    peak: float, warmup_steps: int, total_steps: int, end: float = 0.0
) -> Callable[[Tensor | int], Tensor]:
    r"""Rise linearly from 0 to the peak, then fall to the end along half a cosine.

    ``warmup_linear`` with :math:`(1 - \cos \pi r(t)) / 2` in the place of
    :math:`r(t)`: the same values at the same steps (0 at step 0 if W > 0, the peak at
    step W < T, the end at step T and after), and flat at both ends of the fall.

    Args:
      peak: The highest rate, at least 0.
      warmup_steps: W, in updates; 0 starts at the peak.
      total_steps: T, in updates; at least 1 and at least W.
      end: The last rate, at least 0.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: A rate that is not a number or a count that is not an int.
      ValueError: A negative rate or count, or ``warmup_steps > total_steps``.

    Examples:
      >>> rate = warmup_cosine(1.0, warmup_steps=2, total_steps=6, end=0.1)
      >>> [round(float(rate(step)), 3) for step in range(8)]
      [0.0, 0.5, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]

    References:
      Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017, equation
      5 without restarts.

    Differs from:
      ``CosineAnnealingLR`` rises again after T. nanoGPT's warm-up is
      :math:`(t + 1) / (W + 1)`, so that its first update moves something.
    """
    return _warmup("warmup_cosine", peak, warmup_steps, total_steps, end, half_cosine)


def cosine(
    peak: float, total_steps: int, end: float = 0.0
) -> Callable[[Tensor | int], Tensor]:
    r"""Fall from the peak to the end along half a cosine: ``warmup_cosine`` with W = 0.

    .. math::
      \eta(t) = \text{end} + (\text{peak} - \text{end})
        \frac{1 + \cos(\pi \min(t / T, 1))}{2}

    Exactly the peak at step 0, and the end at step T and after.

    Args:
      peak: The first rate, at least 0.
      total_steps: T, in updates; at least 1.
      end: The last rate, at least 0.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: A rate that is not a number or a count that is not an int.
      ValueError: A negative rate, or fewer than one step.

    Laws:
      ``torch.optim.lr_scheduler.CosineAnnealingLR`` up to step T, to rounding.

    Examples:
      >>> rate = cosine(1.0, total_steps=4)
      >>> [round(float(rate(step)), 3) for step in range(6)]
      [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    References:
      Loshchilov and Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017, equation
      5 without restarts.

    Differs from:
      ``CosineAnnealingLR`` rises again after T. DeepSpeed has it only with a warm-up:
      ``warmup_cosine_lr``.
    """
    return _warmup("cosine", peak, 0, total_steps, end, half_cosine)


def _warmup(
    name: str,
    peak: Any,
    warmup_steps: Any,
    total_steps: Any,
    end: Any,
    shape: Callable[[Tensor], Tensor],
) -> Callable[[Tensor | int], Tensor]:
    """The warm-up, and a fall along ``shape``, which maps 1 to 1 and 0 to 0."""
    high = check_number(f"{name}: peak", peak, instead="peak=3e-4")
    low = check_number(f"{name}: end", end, instead="end=0.0")
    warm = check_count(
        f"{name}: warmup_steps", warmup_steps, low=0, instead="warmup_steps=100"
    )
    total = check_count(
        f"{name}: total_steps", total_steps, low=1, instead="total_steps=1000"
    )
    if warm > total:
        raise ValueError(
            f"{name}: warmup_steps is {warm} and total_steps is {total}, expected "
            f"warmup_steps <= total_steps; type for example total_steps={10 * warm}"
        )

    def schedule(step: Tensor | int) -> Tensor:
        t = as_float(step)
        left = shape(((total - t) / max(total - warm, 1)).clamp(0.0, 1.0))
        # A weighted mean: exact at both ends, which end + (peak - end) * left is not.
        fall = high * left + low * (1.0 - left)
        return torch.where(t < warm, high * (t / max(warm, 1)), fall)

    return schedule


@pytree
class ScaleByLearningRateMoments:
    """What ``scale_by_learning_rate`` remembers: the number of updates so far.

    Examples:
      >>> ScaleByLearningRateMoments(torch.tensor(3)).count
      tensor(3)
    """

    count: Tensor


def scale_by_learning_rate(learning_rate: float | Schedule) -> GradientTransformation:
    r"""Multiply every update by :math:`-\eta(t)`: the last part of an optimizer.

    t counts the updates before this one, so the first uses :math:`\eta(0)`. The count
    is kept for a constant rate too: its moments fit any schedule that replaces it.

    Args:
      learning_rate: A constant, at least 0, or a schedule: a function from a 0-d int64
        tensor to a 0-d tensor or a number, without a host sync.

    Returns:
      A transformation with ``ScaleByLearningRateMoments``.

    Raises:
      TypeError: Neither a number nor a function; or (from ``update``) a schedule that
        returns something else than a number or a 0-d tensor.
      ValueError: A negative rate.
      StructureError: (from ``update``) the moments of something else.

    Examples:
      >>> tx, p = scale_by_learning_rate(warmup_linear(1.0, 0, 2)), torch.zeros(1)
      >>> first, moments = tx.update(torch.ones(1), tx.init(p), p)
      >>> first, tx.update(torch.ones(1), moments, p)[0]
      (tensor([-1.]), tensor([-0.5000]))

    Differs from:
      ``torch.optim.lr_scheduler`` writes to the optimizer, after the update.
    """
    schedule = as_schedule(learning_rate)

    def init(params: PyTree) -> PyTree:
        return ScaleByLearningRateMoments(new_count(params))

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        expected = ScaleByLearningRateMoments(LEAF)
        check_moments("scale_by_learning_rate", expected, moments)
        rate = value_at("the learning-rate schedule", schedule, moments.count)

        def one(u: Tensor) -> Tensor:
            wide = widen(u)
            return -rate.to(wide.dtype) * wide

        after = ScaleByLearningRateMoments(moments.count + 1)
        return tree_map(one, updates), after

    return GradientTransformation(init, update, leafwise=True)


def as_schedule(learning_rate: Any) -> Schedule:
    """A learning rate as a schedule; a number is a constant one.

    Args:
      learning_rate: A number, at least 0, or a function of the step.

    Raises:
      TypeError: Neither.
      ValueError: A negative number.

    Examples:
      >>> as_schedule(0.5)(torch.tensor(3))
      tensor(0.5000, dtype=torch.float64)
    """
    if callable(learning_rate):
        return learning_rate  # type: ignore[no-any-return]
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, Real):
        raise TypeError(
            f"learning_rate is a {type(learning_rate).__name__}, expected a number or "
            "a function of the step; type for example 3e-4 or "
            "warmup_cosine(3e-4, warmup_steps=100, total_steps=1000)"
        )
    return constant(check_number("learning_rate", learning_rate, instead="3e-4"))
