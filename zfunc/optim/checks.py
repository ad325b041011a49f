# SPDX-License-Identifier: Apache-2.0
"""Checks of hyper-parameters, made once, when a transformation is."""

import math
from numbers import Real
from typing import Any


def check_number(
    what: str,
    value: Any,
    *,
    low: float = 0.0,
    above_low: bool = False,
    high: float = math.inf,
    instead: str,
) -> float:
    """``value`` as a float of ``[low, high)``, or ``(low, high)`` if ``above_low``.

    Args:
      what: How the message names the value, as ``"adam: b1"``.
      value: What the user gave.
      low: Lower bound.
      above_low: Exclude the lower bound.
      high: Upper bound, excluded; infinity excludes infinity and NaN only.
      instead: What to type instead.

    Returns:
      The value as a float.

    Raises:
      TypeError: Not a number.
      ValueError: Outside of the interval.

    Examples:
      >>> check_number("adam: b1", 1, high=1.0, instead="b1=0.9")
      Traceback (most recent call last):
      ValueError: adam: b1 is 1, expected a number in [0, 1); type for example b1=0.9
    """
    interval = f"{'(' if above_low else '['}{low:g}, {high:g})"
    expected = f"expected a number in {interval}; type for example {instead}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} is a {type(value).__name__}, {expected}")
    number = float(value)
    if not low <= number < high or (above_low and number == low):
        raise ValueError(f"{what} is {value!r}, {expected}")
    return number


def check_count(what: str, value: Any, *, low: int, instead: str) -> int:
    """``value`` as an int of at least ``low``.

    Args:
      what: How the message names the value, as ``"warmup_linear: total_steps"``.
      value: What the user gave.
      low: Least value.
      instead: What to type instead.

    Returns:
      The value.

    Raises:
      TypeError: Not an int.
      ValueError: Less than ``low``.

    Examples:
      >>> check_count("warmup_linear: total_steps", 0, low=1, instead="total_steps=9")
      Traceback (most recent call last):
      ValueError: warmup_linear: total_steps is 0, expected an int >= 1; type for ...
    """
    expected = f"expected an int >= {low}; type for example {instead}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} is a {type(value).__name__}, {expected}")
    if value < low:
        raise ValueError(f"{what} is {value!r}, {expected}")
    return value
