# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's ``LRRangeTest``: a rate that rises until the training diverges."""

from collections.abc import Callable

from torch import Tensor

from zfunc.optim.checks import check_count, check_number
from zfunc.optim.schedule_values import as_float


def lr_range_test(
    lr_range_test_min_lr: float = 1e-3,
    lr_range_test_step_size: int = 2000,
    lr_range_test_step_rate: float = 1.0,
    lr_range_test_staircase: bool = False,
) -> Callable[[Tensor | int], Tensor]:
    r"""DeepSpeed's ``LRRangeTest``: rise linearly, or in stairs, without an end.

    With N = ``lr_range_test_step_size`` and the rate of increase a,

    .. math::
      \eta(t) = \text{min} \cdot (1 + a x), \quad
      x = t / N \text{, or } \lfloor t / N \rfloor \text{ in stairs}

    The loss against the rate of such a run shows between which rates a model learns:
    ``zfunc lr-find`` does it. t counts the updates before this one; DeepSpeed's
    ``last_batch_iteration`` is t - 1, and its formula adds the 1 again.

    Args:
      lr_range_test_min_lr: The first rate, above 0.
      lr_range_test_step_size: N, in updates; at least 1.
      lr_range_test_step_rate: a, at least 0: what is added in N updates, in units of
        the first rate.
      lr_range_test_staircase: Add it at once, after every N updates.

    Returns:
      The schedule; its result is 0-d float64, on the device of the step.

    Raises:
      TypeError: A rate that is not a number, a count that is not an int, a choice that
        is not a bool.
      ValueError: One out of its range.

    Laws:
      DeepSpeed's ``LRRangeTest`` at every step, to rounding.

    Examples:
      >>> rate = lr_range_test(0.5, 2, 1.0)
      >>> [float(rate(step)) for step in range(5)]
      [0.5, 0.75, 1.0, 1.25, 1.5]
      >>> rate = lr_range_test(0.5, 2, 1.0, lr_range_test_staircase=True)
      >>> [float(rate(step)) for step in range(5)]
      [0.5, 0.5, 1.0, 1.0, 1.5]

    References:
      Smith, `A disciplined approach to neural network hyper-parameters
      <https://arxiv.org/abs/1803.09820>`_, 2018.

    Differs from:
      DeepSpeed also takes a list of first rates, one for each parameter group.
    """
    name = "lr_range_test"
    least = check_number(
        f"{name}: lr_range_test_min_lr",
        lr_range_test_min_lr,
        above_low=True,
        instead="lr_range_test_min_lr=1e-3",
    )
    size = check_count(
        f"{name}: lr_range_test_step_size",
        lr_range_test_step_size,
        low=1,
        instead="lr_range_test_step_size=2000",
    )
    growth = check_number(
        f"{name}: lr_range_test_step_rate",
        lr_range_test_step_rate,
        instead="lr_range_test_step_rate=1.0",
    )
    if not isinstance(lr_range_test_staircase, bool):
        raise TypeError(
            f"{name}: lr_range_test_staircase is a "
            f"{type(lr_range_test_staircase).__name__}, expected True or False"
        )

    def schedule(step: Tensor | int) -> Tensor:
        x = as_float(step) / size
        return least * (1.0 + growth * (x.floor() if lr_range_test_staircase else x))

    return schedule
