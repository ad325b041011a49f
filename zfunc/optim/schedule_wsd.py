# SPDX-License-Identifier: Apache-2.0
"""Warm-up, stable, decay: a schedule whose length need not be known at the start."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from zfunc.optim.checks import check_count, check_number
from zfunc.optim.schedule_values import as_float, half_cosine

# How much of the fall is left, from what is left of its time: 1 to 1, and 0 to 0.
_SHAPES: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "linear": lambda left: left,
        "cosine": half_cosine,
        "sqrt": lambda left: 1.0 - (1.0 - left).sqrt(),
    }
)


def wsd(
    peak: float,
    warmup_steps: int,
    decay_steps: int,
    total_steps: int,
    end: float = 0.0,
    decay_type: str = "linear",
) -> Callable[[Tensor | int], Tensor]:
    r"""Rise linearly from 0 to the peak, stay, and fall to the end in the last steps.

    With W warm-up, D decay and T total steps, and the fraction of the fall that is
    left, :math:`r(t) = \mathrm{clip}((T - t) / D, 0, 1)`:

    .. math::
      \eta(t) = \begin{cases}
        \text{peak} \cdot t / W & t < W \\
        \text{peak} \cdot s(r(t)) + \text{end} \cdot (1 - s(r(t))) & t \ge W
      \end{cases}

    where s(r) is r for ``"linear"``, :math:`(1 - \cos \pi r) / 2` for ``"cosine"`` and
    :math:`1 - \sqrt{1 - r}` for ``"sqrt"``. Exactly: 0 at step 0 if W > 0, the peak
    from step W to step T - D, the end at step T and after.

    The stable part knows nothing of T, so a training may go on from any checkpoint of
    it: with another T, or with the fall at once, to see what it is worth.

    Args:
      peak: The highest rate, at least 0.
      warmup_steps: W, in updates; 0 starts at the peak.
      decay_steps: D, in updates; 0 stays at the peak until T.
      total_steps: T, in updates; at least 1 and at least W + D.
      end: The last rate, at least 0.
      decay_type: The shape of the fall: ``"linear"``, ``"cosine"`` or ``"sqrt"``.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: A rate that is not a number or a count that is not an int.
      ValueError: A negative rate or count, an unknown ``decay_type``, or
        ``warmup_steps + decay_steps > total_steps``.

    Laws:
      ``torch.optim.lr_scheduler.SequentialLR`` of a ``LinearLR`` from the peak to the
      end after a ``ConstantLR``, to rounding, with W = 0 and ``"linear"``. With
      D = T - W it is ``warmup_linear`` or ``warmup_cosine``.

    Examples:
      >>> rate = wsd(1.0, warmup_steps=2, decay_steps=2, total_steps=6)
      >>> [float(rate(step)) for step in range(8)]
      [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]

    References:
      Hu et al., `MiniCPM <https://arxiv.org/abs/2404.06395>`_, 2024, section 4; Hägele
      et al., `Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations
      <https://arxiv.org/abs/2405.18392>`_, 2024 (the shape ``"sqrt"``).

    Differs from:
      MiniCPM's fall is exponential, to a tenth. DeepSpeed has no such schedule.
    """
    high = check_number("wsd: peak", peak, instead="peak=3e-4")
    low = check_number("wsd: end", end, instead="end=0.0")
    warm = check_count(
        "wsd: warmup_steps", warmup_steps, low=0, instead="warmup_steps=100"
    )
    decay = check_count(
        "wsd: decay_steps", decay_steps, low=0, instead="decay_steps=100"
    )
    total = check_count(
        "wsd: total_steps", total_steps, low=1, instead="total_steps=1000"
    )
    if warm + decay > total:
        raise ValueError(
            f"wsd: warmup_steps is {warm}, decay_steps is {decay} and total_steps is "
            f"{total}, expected warmup_steps + decay_steps <= total_steps; type for "
            f"example total_steps={10 * (warm + decay)}"
        )
    if not isinstance(decay_type, str) or decay_type not in _SHAPES:
        raise ValueError(
            f"wsd: decay_type is {decay_type!r}, expected 'linear', 'cosine' or "
            "'sqrt'; type for example decay_type='sqrt'"
        )
    shape = _SHAPES[decay_type]

    def schedule(step: Tensor | int) -> Tensor:
        t = as_float(step)
        # With D = 0 what is left is at least 1 before T, and 0 from T on.
        left = shape(((total - t) / max(decay, 1)).clamp(0.0, 1.0))
        # A weighted mean: exact at both ends.
        after = high * left + low * (1.0 - left)
        return torch.where(t < warm, high * (t / max(warm, 1)), after)

    return schedule
