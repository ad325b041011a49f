# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ``OneCycle``: the rate up and down once, the momentum the other way."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zfunc.optim.checks import check_count, check_number
from zfunc.optim.schedule_values import as_float

_MOMENTA = (("cycle_min_mom", 0.8), ("cycle_max_mom", 0.9), ("decay_mom_rate", 0.0))


class OneCycle(NamedTuple):
    """Two schedules that belong together: for ``learning_rate``, and ``b1`` of Adam.

    ``momentum`` is None where the momentum is not cycled.

    Examples:
      >>> from zfunc.optim import adamw
      >>> cycle = one_cycle(1e-4, 1e-3, cycle_first_step_size=100)
      >>> tx = adamw(cycle.learning_rate, b1=cycle.momentum, b2=0.99)
    """

    learning_rate: Callable[[Tensor | int], Tensor]
    momentum: Callable[[Tensor | int], Tensor] | None


def one_cycle(
    cycle_min_lr: float,
    cycle_max_lr: float,
    decay_lr_rate: float = 0.0,
    cycle_first_step_size: int = 2000,
    cycle_second_step_size: int | None = None,
    cycle_first_stair_count: int = 0,
    cycle_second_stair_count: int | None = None,
    decay_step_size: int = 0,
    cycle_momentum: bool = True,
    cycle_min_mom: float = 0.8,
    cycle_max_mom: float = 0.9,
    decay_mom_rate: float = 0.0,
) -> OneCycle:
    r"""DeepSpeed's ``OneCycle``: rate and momentum, through a cycle and a decay.

    With the sizes :math:`N_1, N_2` of the two halves and :math:`N = N_1 + N_2`, where
    in the cycle step t is:

    .. math::
      s(t) = \begin{cases}
        t / N_1 & t \le N_1, t < N \\
        (N - t) / N_2 & N_1 < t \le N
      \end{cases}

    In a half with c > 0 stairs it is :math:`\lfloor c \, s(t) \rfloor / c`. Then

    .. math::
      \eta(t) &= \text{min} + (\text{max} - \text{min}) s(t), \quad
      \mu(t) = \text{max}' - (\text{max}' - \text{min}') s(t) & t \le N \\
      \eta(t) &= \frac{\text{min}}{1 + a (t - N) / D}, \quad
      \mu(t) = \text{max}' \left(1 + a' \frac{t - N}{D}\right) & t > N

    with D = ``decay_step_size`` and the two rates of decay a and a'; with a rate of 0
    its quantity stays. t counts the updates before this one; DeepSpeed's
    ``last_batch_iteration`` is t - 1.

    One value is not of the formula: the momentum of step 0 is :math:`\text{min}'`,
    because DeepSpeed's constructor sets it so; that of step 1 is nearly
    :math:`\text{max}'`. Adam's first update does not depend on it, its weight in the
    later ones does. A decay of the momentum *raises* it; it is at 1, where Adam fails,
    after :math:`(1 / \text{max}' - 1) D / a'` steps of decay, and nothing stops it.

    Args:
      cycle_min_lr: The rate at both ends of the cycle, at least 0.
      cycle_max_lr: The rate between its halves, at least ``cycle_min_lr``.
      decay_lr_rate: a, at least 0; needs ``decay_step_size``.
      cycle_first_step_size: :math:`N_1`, in updates; at least 1.
      cycle_second_step_size: :math:`N_2`, in updates, at least 0; :math:`N_1` if None.
      cycle_first_stair_count: Stairs of the first half; 0 is none of them.
      cycle_second_stair_count: Stairs of the second half; as the first if None.
      decay_step_size: D, in updates; 0 is no decay.
      cycle_momentum: Whether to make a schedule of the momentum.
      cycle_min_mom: Momentum between the halves, in [0, 1).
      cycle_max_mom: Momentum at both ends, in [0, 1), at least ``cycle_min_mom``.
      decay_mom_rate: a', at least 0; needs ``decay_step_size``.

    Returns:
      ``learning_rate`` and ``momentum``, two schedules; the second is None without
      ``cycle_momentum``.

    Raises:
      TypeError: A rate that is not a number, a count that is not an int, a choice that
        is not a bool.
      ValueError: One out of its range; a rate of decay without ``decay_step_size``, or
        the other way round; an option of the momentum without ``cycle_momentum``.

    Laws:
      DeepSpeed's ``OneCycle`` at every step, to rounding.

    Examples:
      >>> cycle = one_cycle(0.0, 1.0, cycle_first_step_size=2)
      >>> [float(cycle.learning_rate(step)) for step in range(6)]
      [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
      >>> [round(float(cycle.momentum(step)), 2) for step in range(6)]
      [0.8, 0.85, 0.8, 0.85, 0.9, 0.9]

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018.

    Differs from:
      DeepSpeed writes ``betas = (momentum, 0.99)`` to the optimizer, whatever its
      second one was: give ``b2=0.99`` to train as it does. It cycles the momentum only
      of optimizers with ``betas``; ``sgd`` takes one too. It ignores a rate of decay
      without ``decay_step_size``. ``torch.optim.lr_scheduler.OneCycleLR`` is another
      schedule: it rises from a 25th of the peak along a cosine by default, falls to
      a far lower end within the cycle, and has no decay after it.
    """
    name = "one_cycle"
    rates = _bounds(name, "lr", cycle_min_lr, cycle_max_lr, ("1e-4", "1e-3"))
    where = _where(
        (cycle_first_step_size, cycle_second_step_size),
        (cycle_first_stair_count, cycle_second_stair_count),
    )
    decays = _decays(decay_lr_rate, decay_mom_rate, decay_step_size)
    low, high = rates

    def learning_rate(step: Tensor | int) -> Tensor:
        scale, after = where(step)
        falling = low / (1.0 + decays[0] * after)
        return torch.where(after > 0, falling, low + (high - low) * scale)

    if not isinstance(cycle_momentum, bool):
        raise TypeError(
            f"{name}: cycle_momentum is a {type(cycle_momentum).__name__}, expected "
            "True or False"
        )
    if not cycle_momentum:
        _check_no_momentum((cycle_min_mom, cycle_max_mom, decay_mom_rate))
        return OneCycle(learning_rate, None)
    least, most = _bounds(name, "mom", cycle_min_mom, cycle_max_mom, ("0.8", "0.9"))

    def momentum(step: Tensor | int) -> Tensor:
        scale, after = where(step)
        cycled = most - (most - least) * scale
        value = torch.where(after > 0, most * (1.0 + decays[1] * after), cycled)
        return torch.where(as_float(step) < 1, least, value)

    return OneCycle(learning_rate, momentum)


def _bounds(
    name: str, kind: str, low: Any, high: Any, example: tuple[str, str]
) -> tuple[float, float]:
    """The least and the largest of a cycle: ``kind`` is ``lr`` or ``mom``."""
    low_name, high_name = f"cycle_min_{kind}", f"cycle_max_{kind}"
    bound = 1.0 if kind == "mom" else math.inf
    low_instead, high_instead = f"{low_name}={example[0]}", f"{high_name}={example[1]}"
    least = check_number(f"{name}: {low_name}", low, high=bound, instead=low_instead)
    most = check_number(f"{name}: {high_name}", high, high=bound, instead=high_instead)
    if least > most:
        raise ValueError(
            f"{name}: {low_name} is {low!r} and {high_name} is {high!r}, expected "
            f"{low_name} <= {high_name}; type for example {low_instead}, {high_instead}"
        )
    return least, most


def _where(
    sizes: tuple[Any, Any], stairs: tuple[Any, Any]
) -> Callable[[Tensor | int], tuple[Tensor, Tensor]]:
    """From the step to s of the cycle, and to the updates since the cycle."""
    prefix, size, stair = "one_cycle: cycle_", "step_size", "stair_count"
    instead = "cycle_first_step_size=2000"
    first = check_count(f"{prefix}first_{size}", sizes[0], low=1, instead=instead)
    second = first if sizes[1] is None else sizes[1]
    instead = "cycle_second_step_size=2000"
    second = check_count(f"{prefix}second_{size}", second, low=0, instead=instead)
    instead = "cycle_first_stair_count=0"
    up = check_count(f"{prefix}first_{stair}", stairs[0], low=0, instead=instead)
    down = up if stairs[1] is None else stairs[1]
    instead = "cycle_second_stair_count=0"
    down = check_count(f"{prefix}second_{stair}", down, low=0, instead=instead)
    total = first + second

    def where(step: Tensor | int) -> tuple[Tensor, Tensor]:
        t = as_float(step)
        rising = (t <= first) & (t < total)
        left = (total - t).clamp(min=0.0)
        scale = torch.where(
            rising, _in_stairs(t, first, up), _in_stairs(left, max(second, 1), down)
        )
        return scale, (t - total).clamp(min=0.0)

    return where


def _in_stairs(done: Tensor, size: int, count: int) -> Tensor:
    """The fraction of a half that is done; rounded down to a stair if there are any."""
    return (done * count / size).floor() / count if count else done / size


def _decays(lr_rate: Any, mom_rate: Any, step_size: Any) -> tuple[float, float]:
    """What is lost of the rate, and gained by the momentum, in each update."""
    prefix = "one_cycle: decay_"
    lr = check_number(f"{prefix}lr_rate", lr_rate, instead="decay_lr_rate=0.1")
    mom = check_number(f"{prefix}mom_rate", mom_rate, instead="decay_mom_rate=0.0")
    instead = "decay_step_size=1000"
    size = check_count(f"{prefix}step_size", step_size, low=0, instead=instead)
    if size and not (lr or mom):
        raise ValueError(
            f"{prefix}step_size is {size}, which has no effect without a rate of "
            "decay; type for example decay_lr_rate=0.1, or leave decay_step_size out"
        )
    if (lr or mom) and not size:
        raise ValueError(
            f"{prefix}lr_rate is {lr!r} and decay_mom_rate is {mom!r}, which have no "
            "effect without decay_step_size; type for example decay_step_size=1000"
        )
    return lr / max(size, 1), mom / max(size, 1)


def _check_no_momentum(given: tuple[Any, Any, Any]) -> None:
    for (option, default), value in zip(_MOMENTA, given, strict=True):
        if value != default:
            raise ValueError(
                f"one_cycle: {option} is {value!r}, which has no effect with "
                f"cycle_momentum=False; leave {option} out, or type cycle_momentum=True"
            )
