# SPDX-License-Identifier: Apache-2.0
"""Schedules made of schedules: one after the other, and times a factor."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from zfunc.optim.checks import check_count, check_number
from zfunc.optim.schedule_values import Schedule, as_step, value_at


def join(
    schedules: Sequence[Schedule], boundaries: Sequence[int]
) -> Callable[[Tensor | int], Tensor]:
    r"""One schedule after the other, each from its own step 0.

    With boundaries :math:`B_1 < \dots < B_{n-1}`, and :math:`B_0 = 0`,
    :math:`B_n = \infty`:

    .. math::
      \eta(t) = \eta_k(t - B_k) \quad \text{for } B_k \le t < B_{k+1}

    Args:
      schedules: n functions of the step, at least one.
      boundaries: Where each one after the first begins: n - 1 increasing ints, above 0.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: A schedule that is not a function or a boundary that is not an int;
        (from the schedule) a schedule that returns something else than a number or a
        0-d tensor.
      ValueError: No schedule, another number of boundaries, or not increasing ones.

    Laws:
      ``torch.optim.lr_scheduler.SequentialLR`` at every step, to rounding. Joins of
      joins are joins: ``join([join([a, b], [m]), c], [n]) == join([a, b, c], [m, n])``
      for m < n.

    Examples:
      >>> from zfunc.optim import constant, warmup_linear
      >>> rate = join([constant(0.5), warmup_linear(1.0, 0, 4)], [2])
      >>> [float(rate(step)) for step in range(7)]
      [0.5, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]

    Differs from:
      Every schedule is evaluated at every step (those that have not begun, at their
      step 0; those that have ended, beyond their end) and one is selected, on the
      device: a branch would read the step on the host. A value of NaN or infinity that
      is not selected does no harm.
    """
    parts, starts = tuple(schedules), tuple(boundaries)
    if not parts or len(starts) != len(parts) - 1:
        raise ValueError(
            f"join: got {len(parts)} schedules and {len(starts)} boundaries, expected "
            "one boundary between two schedules; type for example "
            "join([warmup, decay], [100])"
        )
    for position, part in enumerate(parts):
        if not callable(part):
            raise TypeError(
                f"join: schedule {position} is a {type(part).__name__}, expected a "
                "function of the step; type for example constant(3e-4)"
            )
    for position, start in enumerate(starts):
        instead = "join([warmup, decay], [100])"
        check_count(f"join: boundary {position}", start, low=1, instead=instead)
    if any(second <= first for first, second in pairwise(starts)):
        raise ValueError(
            f"join: the boundaries are {list(starts)}, expected each to be more than "
            f"the one before; type for example {sorted(set(starts))}"
        )

    def schedule(step: Tensor | int) -> Tensor:
        t = as_step(step)
        value = _value("join: schedule 0", parts[0], t)
        for position, (part, start) in enumerate(zip(parts[1:], starts, strict=True)):
            own = (t - start).clamp(min=0)
            later = _value(f"join: schedule {position + 1}", part, own)
            value = torch.where(t < start, value, later)
        return value

    return schedule


def scaled(
    schedule: Schedule, factor: float | Schedule
) -> Callable[[Tensor | int], Tensor]:
    r"""A schedule times a number, or times another: :math:`t \mapsto f(t) \eta(t)`.

    Args:
      schedule: :math:`\eta`, a function of the step.
      factor: f, at least 0, or a function of the step.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: A schedule that is not a function, a factor that is neither a number
        nor one; (from the schedule) a function that returns something else than a
        number or a 0-d tensor.
      ValueError: A negative factor.

    Laws:
      Commutes with ``join``: the joined parts scaled are the join scaled.

    Examples:
      >>> from zfunc.optim import warmup_linear
      >>> rate = scaled(warmup_linear(1.0, 0, 4), 0.1)
      >>> [round(float(rate(step)), 3) for step in range(5)]
      [0.1, 0.075, 0.05, 0.025, 0.0]
    """
    if not callable(schedule):
        raise TypeError(
            f"scaled: schedule is a {type(schedule).__name__}, expected a function of "
            "the step; type for example scaled(constant(3e-4), 0.1)"
        )
    if not callable(factor):
        factor = check_number("scaled: factor", factor, instead="factor=0.1")

    def product(step: Tensor | int) -> Tensor:
        t = as_step(step)
        times = _value("scaled: factor", factor, t) if callable(factor) else factor
        return _value("scaled: schedule", schedule, t) * times

    return product


def _value(what: str, schedule: Schedule, step: Tensor) -> Tensor:
    return value_at(what, schedule, step).to(torch.float64)
