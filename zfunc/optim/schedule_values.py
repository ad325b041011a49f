# SPDX-License-Identifier: Apache-2.0
"""What schedules are made of, and how transformations read one."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zfunc.optim.checks import check_number

Schedule = Callable[[Tensor], Tensor | float]


def as_float(step: Any) -> Tensor:
    """The step in float64, which holds every int up to 2^53.

    Args:
      step: A tensor, or an int.

    Returns:
      A tensor of the step's shape, on its device.

    Raises:
      TypeError: Something else.

    Examples:
      >>> as_float(3)
      tensor(3., dtype=torch.float64)
    """
    return as_step(step).to(torch.float64)


def as_step(step: Any) -> Tensor:
    """The step as a tensor; an int becomes a 0-d one on the CPU.

    Args:
      step: A tensor, or an int.

    Returns:
      The tensor.

    Raises:
      TypeError: Something else.

    Examples:
      >>> as_step(3)
      tensor(3)
    """
    if isinstance(step, Tensor):
        return step
    if isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(
            f"a schedule was given a {type(step).__name__}, expected the step as an "
            "int or a tensor; type for example schedule(0)"
        )
    return torch.tensor(step)


def value_at(what: str, schedule: Schedule, step: Tensor) -> Tensor:
    """The value of a schedule, which may return a number, as a tensor.

    Args:
      what: How the message names the schedule, as ``"the learning-rate schedule"``.
      schedule: A function of the step.
      step: The number of updates before this one.

    Returns:
      A 0-d tensor: what the schedule returned, or its number in float64.

    Raises:
      TypeError: The schedule returned something else.

    Examples:
      >>> value_at("the learning-rate schedule", lambda step: 0.5, torch.tensor(3))
      tensor(0.5000, dtype=torch.float64)
    """
    value: Any = schedule(step)
    if isinstance(value, Tensor) and value.dim() == 0:
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        kind, shape = type(value).__name__, getattr(value, "shape", None)
        got = f"a {kind}" if shape is None else f"a {kind} of shape {tuple(shape)}"
        raise TypeError(
            f"{what} returned {got}, expected a 0-d tensor or a number; type for "
            "example lambda step: 0.1 * 0.5**step"
        )
    return torch.full_like(step, float(value), dtype=torch.float64)


def check_factor(
    what: str, value: Any, *, high: float = math.inf, instead: str
) -> float | Schedule:
    """A number of [0, high), or a schedule, which cannot be checked before it is used.

    Args:
      what: How the message names the value, as ``"scale_by_adam: b1"``.
      value: What the user gave.
      high: Upper bound, excluded.
      instead: What to type instead.

    Returns:
      The number as a float, or the schedule.

    Raises:
      TypeError: Neither a number nor a function.
      ValueError: A number outside of the interval.

    Examples:
      >>> check_factor("scale_by_adam: b1", 0, high=1.0, instead="b1=0.9")
      0.0
    """
    if callable(value):
        return value  # type: ignore[no-any-return]
    return check_number(what, value, high=high, instead=instead)


def factor_at(what: str, factor: float | Schedule, step: Tensor) -> float | Tensor:
    """A number as it is, so that its bits are; of a schedule the value in float64.

    Args:
      what: How the message names the factor, as ``"scale_by_adam: b1"``.
      factor: A number or a schedule.
      step: The number of updates before this one.

    Returns:
      The number, or a 0-d tensor.

    Raises:
      TypeError: A schedule that returns something else than a number or a 0-d tensor.

    Examples:
      >>> (
      ...     factor_at("b1", 0.5, as_step(4)),
      ...     factor_at("b1", lambda step: 2 / step, as_step(4)),
      ... )
      (0.5, tensor(0.5000, dtype=torch.float64))
    """
    if not callable(factor):
        return factor
    return value_at(f"the schedule of {what}", factor, step).to(torch.float64)


def rounded(factor: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A factor for a tensor of a dtype: a number as it is, a tensor in that dtype.

    Args:
      factor: A number or a 0-d tensor.
      dtype: Of what it is multiplied with.

    Returns:
      The number or the tensor.

    Examples:
      >>> rounded(0.1, torch.float32), rounded(as_float(1), torch.float32)
      (0.1, tensor(1.))
    """
    return factor.to(dtype) if isinstance(factor, Tensor) else factor


def half_cosine(r: Tensor) -> Tensor:
    r"""Half a cosine in the place of a line: :math:`(1 - \cos \pi r) / 2`.

    Args:
      r: In [0, 1]; 0 becomes 0 and 1 becomes 1, exactly.

    Returns:
      A tensor like ``r``.

    Examples:
      >>> half_cosine(torch.tensor([0.0, 0.5, 1.0]))
      tensor([0.0000, 0.5000, 1.0000])
    """
    return (r * (math.pi / 2)).sin().square()  # = (1 - cos(pi r)) / 2
