# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's warm-ups: ``WarmupLR``, ``WarmupDecayLR`` and ``WarmupCosineLR``.

DeepSpeed counts with ``last_batch_iteration``, which is -1 before the first update and
is raised after each one. Here t is the number of updates before this one, so the rate
of update t is DeepSpeed's value at ``last_batch_iteration = t - 1``. Its warm-up is 0
at -1 and at 0 alike: the first two updates have the same, lowest, rate.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zfunc.optim.checks import check_count, check_number
from zfunc.optim.schedule_values import as_float

_TYPES = ("log", "linear")


def warmup_lr(
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float = 0.001,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> Callable[[Tensor | int], Tensor]:
    r"""DeepSpeed's ``WarmupLR``: rise from the least to the largest rate and stay.

    With W = max(2, ``warmup_num_steps``), :math:`i = t - 1` (DeepSpeed's
    ``last_batch_iteration``) and the warm-up

    .. math::
      \gamma(t) = \begin{cases}
        \ln(\max(i, 0) + 1) / \ln W & i < W, \text{ log} \\
        \max(i, 0) / W & i < W, \text{ linear} \\
        1 & i \ge W
      \end{cases}

    the rate is :math:`\eta(t) = \text{min} + (\text{max} - \text{min}) \gamma(t)`. So
    steps 0 and 1 both have the least rate; the logarithmic warm-up is at the largest
    from step W on, and half way already at about step :math:`\sqrt W`; the linear one
    is there from step W + 1 on.

    Args:
      warmup_min_lr: The rate at the start, at least 0.
      warmup_max_lr: The rate at the end, at least ``warmup_min_lr``.
      warmup_num_steps: Length of the warm-up, in updates; at least 1, and 1 is taken
        for 2, as DeepSpeed does.
      warmup_type: ``"log"`` or ``"linear"``.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: A rate that is not a number or a count that is not an int.
      ValueError: One out of its range, or an unknown ``warmup_type``.

    Laws:
      DeepSpeed's ``WarmupLR`` at every step, to rounding.

    Examples:
      >>> rate = warmup_lr(0.0, 1.0, warmup_num_steps=4, warmup_type="linear")
      >>> [float(rate(step)) for step in range(7)]
      [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
      >>> rate = warmup_lr(0.0, 1.0, warmup_num_steps=4)
      >>> [round(float(rate(step)), 3) for step in range(6)]
      [0.0, 0.0, 0.5, 0.792, 1.0, 1.0]

    References:
      DeepSpeed, `Learning Rate Schedulers
      <https://deepspeed.readthedocs.io/en/latest/schedulers.html>`_.

    Differs from:
      DeepSpeed takes a ``warmup_max_lr`` of None for the optimizer's rate (a schedule
      here knows no optimizer), and with a warning any unknown ``warmup_type`` for
      ``"log"``. ``warmup_linear`` reaches its peak at step W, and only its step 0 has
      rate 0.
    """
    name = "warmup_lr"
    low, high = _rates(name, warmup_min_lr, warmup_max_lr)
    warm, rise = _rise(name, warmup_num_steps, warmup_type)

    def schedule(step: Tensor | int) -> Tensor:
        t = as_float(step)
        gamma = torch.where(t <= warm, rise(t), 1.0)
        return low + (high - low) * gamma

    return schedule


def warmup_decay_lr(
    total_num_steps: int,
    warmup_min_lr: float = 0.0,
    warmup_max_lr: float = 0.001,
    warmup_num_steps: int = 1000,
    warmup_type: str = "log",
) -> Callable[[Tensor | int], Tensor]:
    r"""DeepSpeed's ``WarmupDecayLR``: ``warmup_lr``, then fall linearly to the least.

    With T = ``total_num_steps``, and W, :math:`i = t - 1` and :math:`\gamma` of
    ``warmup_lr``, after the warm-up (:math:`i \ge W`)

    .. math::
      \gamma(t) = \max\left(0, \frac{T - i}{\max(1, T - W)}\right)

    So the largest rate is at step W + 1 and the least at step T + 1 and after.

    Args:
      total_num_steps: T, in updates; at least ``warmup_num_steps``.
      warmup_min_lr: The rate at the start and at the end, at least 0.
      warmup_max_lr: The rate between them, at least ``warmup_min_lr``.
      warmup_num_steps: As of ``warmup_lr``.
      warmup_type: ``"log"`` or ``"linear"``.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: A rate that is not a number or a count that is not an int.
      ValueError: One out of its range, an unknown ``warmup_type``, or
        ``warmup_num_steps > total_num_steps``.

    Laws:
      DeepSpeed's ``WarmupDecayLR`` at every step, to rounding.

    Examples:
      >>> rate = warmup_decay_lr(6, 0.0, 1.0, warmup_num_steps=2, warmup_type="linear")
      >>> [float(rate(step)) for step in range(9)]
      [0.0, 0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]

    References:
      DeepSpeed, `Learning Rate Schedulers
      <https://deepspeed.readthedocs.io/en/latest/schedulers.html>`_.

    Differs from:
      DeepSpeed only warns of a warm-up that is longer than the training.
      ``warmup_linear`` is one step earlier, and its end is apart from its start.
    """
    name = "warmup_decay_lr"
    low, high = _rates(name, warmup_min_lr, warmup_max_lr)
    warm, rise = _rise(name, warmup_num_steps, warmup_type)
    total = _total(name, total_num_steps, warmup_num_steps)

    def schedule(step: Tensor | int) -> Tensor:
        t = as_float(step)
        fall = ((total + 1 - t) / max(1, total - warm)).clamp(min=0.0)
        return low + (high - low) * torch.where(t <= warm, rise(t), fall)

    return schedule


def warmup_cosine_lr(
    lr: float,
    total_num_steps: int,
    warmup_min_ratio: float = 0.0,
    warmup_num_steps: int = 1000,
    cos_min_ratio: float = 0.0001,
    warmup_type: str = "log",
) -> Callable[[Tensor | int], Tensor]:
    r"""DeepSpeed's ``WarmupCosineLR``: ratios of one rate, the fall half a cosine.

    With T = ``total_num_steps``, the ratios m (``warmup_min_ratio``) and c
    (``cos_min_ratio``), and W, :math:`i = t - 1` and :math:`\gamma` of ``warmup_lr``,
    the rate is ``lr`` times

    .. math::
      r(t) = \begin{cases}
        0 & i < 0 \\
        m + (1 - m) \gamma(t) & 0 \le i < W \\
        c + (1 - c) \tfrac{1}{2} \left(1 + \cos\left(\pi
          \min\left(1, \frac{i - W + 1}{\max(1, T - W)}\right)\right)\right) & i \ge W
      \end{cases}

    Step 0 has rate 0 whatever m is. The fall is already one step under way when it
    begins, so that the linear warm-up never reaches ``lr``; c is reached at step T.

    Args:
      lr: What the ratios are of, at least 0.
      total_num_steps: T, in updates; at least ``warmup_num_steps``.
      warmup_min_ratio: The ratio where the warm-up begins, in [0, 1].
      warmup_num_steps: As of ``warmup_lr``.
      cos_min_ratio: The ratio at the end, in [0, 1].
      warmup_type: ``"log"`` or ``"linear"``.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: A rate that is not a number or a count that is not an int.
      ValueError: One out of its range, an unknown ``warmup_type``, or
        ``warmup_num_steps > total_num_steps``.

    Laws:
      DeepSpeed's ``WarmupCosineLR`` at every step, to rounding.

    Examples:
      >>> rate = warmup_cosine_lr(1.0, 6, 0.2, 2, cos_min_ratio=0.1)
      >>> [round(float(rate(step)), 3) for step in range(8)]
      [0.0, 0.2, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]

    References:
      DeepSpeed, `Learning Rate Schedulers
      <https://deepspeed.readthedocs.io/en/latest/schedulers.html>`_; Loshchilov and
      Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_, 2017.

    Differs from:
      DeepSpeed takes ``lr`` from the optimizer, and only warns of a warm-up that is
      longer than the training. ``warmup_cosine`` reaches its peak at step W.
    """
    name = "warmup_cosine_lr"
    base = check_number(f"{name}: lr", lr, instead="lr=3e-4")
    low = _ratio(f"{name}: warmup_min_ratio", warmup_min_ratio)
    end = _ratio(f"{name}: cos_min_ratio", cos_min_ratio)
    warm, rise = _rise(name, warmup_num_steps, warmup_type)
    total = _total(name, total_num_steps, warmup_num_steps)

    def schedule(step: Tensor | int) -> Tensor:
        t = as_float(step)
        done = ((t - warm) / max(1, total - warm)).clamp(max=1.0)
        fall = end + (1.0 - end) * ((1.0 + (math.pi * done).cos()) / 2)
        ratio = torch.where(t <= warm, low + (1.0 - low) * rise(t), fall)
        return base * torch.where(t < 1, 0.0, ratio)

    return schedule


def _rates(name: str, low: Any, high: Any) -> tuple[float, float]:
    low_name, high_name = "warmup_min_lr", "warmup_max_lr"
    least = check_number(f"{name}: {low_name}", low, instead=f"{low_name}=0.0")
    most = check_number(f"{name}: {high_name}", high, instead=f"{high_name}=0.001")
    if least > most:
        raise ValueError(
            f"{name}: {low_name} is {low!r} and {high_name} is {high!r}, expected "
            f"{low_name} <= {high_name}; type for example {low_name}=0.0"
        )
    return least, most


def _ratio(what: str, value: Any) -> float:
    name = what.rpartition(" ")[2]
    ratio = check_number(what, value, instead=f"{name}=0.1")
    if ratio > 1:
        raise ValueError(
            f"{what} is {value!r}, expected a number in [0, 1]; type for example "
            f"{name}=0.1"
        )
    return ratio


def _rise(name: str, num_steps: Any, kind: Any) -> tuple[int, Callable[..., Tensor]]:
    """W, and the warm-up of 0 to 1 as a function of t, for t <= W."""
    what = f"{name}: warmup_num_steps"
    warm = max(2, check_count(what, num_steps, low=1, instead="warmup_num_steps=100"))
    if kind not in _TYPES:
        raise ValueError(
            f"{name}: warmup_type is {kind!r}, expected 'log' or 'linear'; type for "
            "example warmup_type='linear'"
        )
    if kind == "log":
        return warm, lambda t: t.clamp(min=1.0).log() / math.log(warm)
    return warm, lambda t: (t - 1.0).clamp(min=0.0) / warm


def _total(name: str, total_num_steps: Any, warmup_num_steps: int) -> int:
    what, instead = f"{name}: total_num_steps", "total_num_steps=10000"
    total = check_count(what, total_num_steps, low=1, instead=instead)
    if total < warmup_num_steps:
        raise ValueError(
            f"{name}: warmup_num_steps is {warmup_num_steps} and total_num_steps is "
            f"{total}, expected warmup_num_steps <= total_num_steps; type for example "
            f"total_num_steps={10 * warmup_num_steps}"
        )
    return total
