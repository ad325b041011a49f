# SPDX-License-Identifier: Apache-2.0
"""Loss scales: the factor that keeps gradients of float16 above zero, as state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from zfunc.core.tree import pytree

# A scale that grew to infinity could not shrink; times a weight it has to be finite.
_LARGEST: Final = 2.0**100


@pytree
class LossScale:
    """The state of a loss scale: 0-d tensors, the same on every rank.

    Attributes:
      scale: What the loss is multiplied by before it is differentiated; float32.
      clean_steps: Steps since the last overflow; int64.
      hysteresis: Overflows that are left until one lowers the scale, 0 if the rule was
        static; int64.
      skipped_steps: Updates that were left out so far; int64.

    Example:
      >>> DynamicLossScale().init(torch.ones(1)).scale
      tensor(65536.)
    """

    scale: Tensor
    clean_steps: Tensor
    hysteresis: Tensor
    skipped_steps: Tensor


@dataclass(frozen=True)
class StaticLossScale:
    """The same scale at every step; a step that overflows is skipped all the same.

    Example:
      >>> StaticLossScale(128.0).init(torch.ones(1)).scale
      tensor(128.)
    """

    scale: float

    def __post_init__(self) -> None:
        _check_number("StaticLossScale", "scale", self.scale)

    def init(self, like: Tensor) -> LossScale:
        """The state before the first step, on the device of ``like``."""
        return _initial(like, self.scale, 0)

    def entered(self, before: LossScale) -> LossScale:
        """The state at the beginning of a step, whatever the rule was until now."""
        scale = torch.full_like(before.scale, self.scale)
        none = torch.zeros_like(before.hysteresis)
        return LossScale(scale, before.clean_steps, none, before.skipped_steps)

    def adjusted(self, before: LossScale, is_finite: Tensor) -> LossScale:
        """The state after a step whose gradients were finite or not."""
        return LossScale(
            before.scale,
            torch.where(is_finite, before.clean_steps + 1, 0),
            before.hysteresis,
            before.skipped_steps + (~is_finite).to(torch.int64),
        )


@dataclass(frozen=True)
class DynamicLossScale:
    r"""A scale that halves when gradients overflow, and doubles when they long did not.

    With H = ``hysteresis`` and the overflows h that are left, a step does:

    * overflow: if h is 1, :math:`s \leftarrow \max(s / 2, s_{min})`; else
      :math:`h \leftarrow h - 1`. The count of clean steps c becomes 0.
    * clean: if c is a multiple of the window and not 0, :math:`s \leftarrow 2 s` and
      :math:`h \leftarrow H`. Then c grows by 1. With ``consecutive_hysteresis`` every
      clean step sets h to H.

    So the first growth comes after ``loss_scale_window + 1`` clean steps, and h stays 1
    from the first halving to the next growth.

    Args:
      initial_scale_power: The first scale is 2 to this power.
      loss_scale_window: Clean steps between two growths.
      hysteresis: Overflows, since the last growth, that it takes to halve the scale.
      consecutive_hysteresis: They have to be in a row.
      min_loss_scale: The scale never falls below.

    Raises:
      ValueError: A number out of its range; the message says which.
      TypeError: Something that is not a number.

    Laws: the state is the same on every rank and at every stage of ZeRO; no host sync.

    References:
      Micikevicius et al., `Mixed precision training
      <https://arxiv.org/abs/1710.03740>`_, 2018, section 3.2.

    Differs from DeepSpeed: the rule is that of its ZeRO stages at every stage (its
    stage 0 ignores the hysteresis). An overflow at the smallest scale is skipped and
    counted instead of raised: raising would need a host sync at every step. (A policy
    can stop there: ``zf.Recovery``.)

    Example:
      >>> rule = DynamicLossScale(initial_scale_power=4, hysteresis=1)
      >>> after = rule.adjusted(rule.init(torch.ones(1)), torch.tensor(False))
      >>> after.scale, after.skipped_steps
      (tensor(8.), tensor(1))
    """

    initial_scale_power: int = 16
    loss_scale_window: int = 1000
    hysteresis: int = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: float = 1.0

    def __post_init__(self) -> None:
        name = "DynamicLossScale"
        for field, low, high in (
            ("initial_scale_power", 0, 100),
            ("loss_scale_window", 1, 2**62),
            ("hysteresis", 1, 2**62),
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: {field} is an int, got {value!r}")
            if not low <= value <= high:
                raise ValueError(
                    f"{name}: {field} is {value}, expected {low} to {high}; type for "
                    f"example {field}={type(self).__dict__[field]}"
                )
        if not isinstance(self.consecutive_hysteresis, bool):
            raise TypeError(
                f"{name}: consecutive_hysteresis is True or False, got "
                f"{self.consecutive_hysteresis!r}"
            )
        _check_number(name, "min_loss_scale", self.min_loss_scale)
        if self.min_loss_scale > 2.0**self.initial_scale_power:
            raise ValueError(
                f"{name}: min_loss_scale is {self.min_loss_scale}, more than the first "
                f"scale of 2**{self.initial_scale_power}; raise initial_scale_power"
            )

    def init(self, like: Tensor) -> LossScale:
        """The state before the first step, on the device of ``like``."""
        return _initial(like, 2.0**self.initial_scale_power, self.hysteresis)

    def entered(self, before: LossScale) -> LossScale:
        """The state at the beginning of a step; that of a start after a static rule."""
        is_new = before.hysteresis == 0
        first = 2.0**self.initial_scale_power
        return LossScale(
            torch.where(is_new, first, before.scale),
            torch.where(is_new, 0, before.clean_steps),
            torch.where(is_new, self.hysteresis, before.hysteresis),
            before.skipped_steps,
        )

    def adjusted(self, before: LossScale, is_finite: Tensor) -> LossScale:
        """The state after a step whose gradients were finite or not."""
        clean, left = before.clean_steps, before.hysteresis
        lowers = ~is_finite & (left <= 1)
        grows = is_finite & (clean > 0) & (clean % self.loss_scale_window == 0)
        lower = (before.scale / 2).clamp(min=self.min_loss_scale)
        higher = (before.scale * 2).clamp(max=_LARGEST)
        scale = torch.where(lowers, lower, torch.where(grows, higher, before.scale))
        refilled = is_finite if self.consecutive_hysteresis else grows
        spent = (~is_finite & ~lowers).to(torch.int64)
        return LossScale(
            scale,
            torch.where(is_finite, clean + 1, 0),
            torch.where(refilled, self.hysteresis, left - spent),
            before.skipped_steps + (~is_finite).to(torch.int64),
        )


def _initial(like: Tensor, scale: float, hysteresis: int) -> LossScale:
    def count(value: int) -> Tensor:
        return like.new_full((), value, dtype=torch.int64)

    first = like.new_full((), scale, dtype=torch.float32)
    return LossScale(first, count(0), count(hysteresis), count(0))


def _check_number(name: str, field: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: {field} is a number, got {value!r}")
    if not 0 < value <= _LARGEST:
        raise ValueError(
            f"{name}: {field} is {value}, expected more than 0 and at most 2**100; "
            f"type for example {field}=1.0"
        )
