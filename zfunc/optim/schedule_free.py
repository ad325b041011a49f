# SPDX-License-Identifier: Apache-2.0
"""Schedule-free learning: averaging in the place of a falling learning rate."""

import torch
from torch import Tensor

from zfunc.core.state import TrainState
from zfunc.core.tree import PyTree, pytree, tree_map
from zfunc.optim.base import (
    LEAF,
    GradientTransformation,
    chain,
    check_moments,
    check_updates,
    new_count,
    widen,
)
from zfunc.optim.checks import check_count, check_number
from zfunc.optim.decay import Mask, add_decayed_weights
from zfunc.optim.ema import only_moments
from zfunc.optim.rmsprop import scale_by_rms
from zfunc.optim.schedules import Schedule, as_schedule, value_at


@pytree
class ScheduleFreeMoments:
    r"""What ``schedule_free`` remembers besides the parameters y.

    ``count`` is the number of updates, ``total`` the sum of the squares of the learning
    rates, ``b1`` is :math:`\beta_1` (which makes x of y and z), ``z`` the sequence that
    takes the plain steps.

    Examples:
      >>> moments = schedule_free(0.1).init({"w": torch.ones(1)})
      >>> moments.z, moments.b1
      ({'w': tensor([1.])}, tensor(0.9000, dtype=torch.float64))
    """

    count: Tensor
    total: Tensor
    b1: Tensor
    z: PyTree


def schedule_free(
    learning_rate: float | Schedule, b1: float = 0.9
) -> GradientTransformation:
    r"""Step along the updates, and move the parameters between the steps' mean and end.

    From :math:`z_1 = x_1 = y_1`, the parameters being y:

    .. math::
      z_{t+1} &= z_t - \gamma_t u_t \\
      c_{t+1} &= \gamma_t^2 / \textstyle\sum_{i \le t} \gamma_i^2 \\
      x_{t+1} &= (1 - c_{t+1}) x_t + c_{t+1} z_{t+1} \\
      y_{t+1} &= (1 - \beta_1) z_{t+1} + \beta_1 x_{t+1}

    x is not kept but is :math:`(y - (1 - \beta_1) z) / \beta_1`, which
    ``schedule_free_params`` returns. It is the last part of a chain, in the place of
    ``scale_by_learning_rate``: alone it is schedule-free gradient descent.

    Args:
      learning_rate: :math:`\gamma`, at least 0, or a schedule.
      b1: :math:`\beta_1` in (0, 1).

    Returns:
      A transformation with ``ScheduleFreeMoments``: one buffer like the parameters, in
      float32 at least.

    Raises:
      TypeError: A hyper-parameter of the wrong kind.
      ValueError: One out of its range.
      StructureError: (from ``update``) the moments of something else.

    Laws:
      x is the mean of :math:`z_2, \dots, z_{t+1}` weighted by the squares of the rates.
      While all rates are 0 nothing moves.

    Examples:
      >>> tx, p, g = schedule_free(1.0, b1=0.5), torch.zeros(1), torch.ones(1)
      >>> first, moments = tx.update(g, tx.init(p), p)
      >>> first, tx.update(g, moments, p + first)[0]
      (tensor([-1.]), tensor([-0.7500]))

    References:
      Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_,
      2024, section 2.

    Differs from:
      The authors' code weighs by the square of the largest rate so far, and writes x
      over y for evaluation.
    """
    schedule = as_schedule(learning_rate)
    beta = check_number(
        "schedule_free: b1", b1, above_low=True, high=1.0, instead="b1=0.9"
    )

    def init(params: PyTree) -> PyTree:
        count = new_count(params)
        total = torch.zeros_like(count, dtype=torch.float64)
        # In memory of its own: a step may write over the parameters it consumes.
        z = tree_map(lambda p: widen(p).clone(), params)
        return ScheduleFreeMoments(count, total, torch.full_like(total, beta), z)

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_updates(params, updates)
        expected = ScheduleFreeMoments(LEAF, LEAF, LEAF, updates)
        check_moments("schedule_free", expected, moments)
        now = value_at("the learning-rate schedule", schedule, moments.count)
        rate = now.to(torch.float64)
        total = moments.total + rate.square()
        weight = torch.where(total == 0, total, rate.square() / total)
        gain = 1 - beta * (1 - weight)
        steps = tree_map(
            lambda u, z: -rate.to(z.dtype) * u.to(z.dtype), updates, moments.z
        )

        # y' - y, with x written in y and z.
        def move(d: Tensor, z: Tensor, y: Tensor) -> Tensor:
            return gain.to(z.dtype) * d + weight.to(z.dtype) * (z - widen(y))

        moves = tree_map(move, steps, moments.z, params)
        after = ScheduleFreeMoments(
            moments.count + 1,
            total,
            torch.full_like(total, beta),
            tree_map(torch.add, moments.z, steps),
        )
        return moves, after

    return GradientTransformation(init, update, leafwise=True)


def schedule_free_adamw(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    mask: Mask | None = None,
) -> GradientTransformation:
    r"""Schedule-free AdamW: AdamW's memory, and no schedule to choose in advance.

    ``schedule_free`` of the gradients divided by the root of a mean of their squares,
    with the weight decay at the parameters y and the rate

    .. math::
      \gamma_t = \eta_t \sqrt{1 - \beta_2^t} \min(1, t / W), \quad t = 1, 2, \dots

    The parameters of the state are y, where gradients are taken; evaluate
    ``schedule_free_params(state)``. Memory: z and the mean square, 8 bytes per
    parameter.

    Args:
      learning_rate: :math:`\eta`, at least 0, or a schedule.
      b1: :math:`\beta_1` in (0, 1); takes the place of momentum.
      b2: :math:`\beta_2` in [0, 1), the decay of the mean square.
      eps: Added to the denominator, at least 0.
      weight_decay: At least 0; the rate scales it.
      warmup_steps: W, in updates; 0 has none.
      mask: Which leaves decay, ``(path, leaf) -> bool``; all if None.

    Returns:
      The optimizer: ``chain(scale_by_rms, add_decayed_weights, schedule_free)``.

    Raises:
      TypeError: A hyper-parameter of the wrong kind; a mask that is not a function,
        or (from ``init`` and ``update``) that returns something else than a bool.
      ValueError: A hyper-parameter out of its range.

    Laws:
      Algorithm 1 of the paper to rounding, at every step.

    Examples:
      >>> from zfunc.optim import apply_updates
      >>> tx, p = schedule_free_adamw(0.1), torch.ones(2)
      >>> updates, moments = tx.update(torch.tensor([5.0, -5.0]), tx.init(p), p)
      >>> apply_updates(p, updates)
      tensor([0.9000, 1.1000])

    References:
      Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_,
      2024, algorithm 1.

    Differs from:
      The authors' code corrects the mean square instead of the rate, so that its
      ``eps`` is another, and weighs by the square of the largest rate so far.
    """
    schedule = as_schedule(learning_rate)
    b2 = check_number("schedule_free_adamw: b2", b2, high=1.0, instead="b2=0.999")
    warm = check_count(
        "schedule_free_adamw: warmup_steps",
        warmup_steps,
        low=0,
        instead="warmup_steps=100",
    )

    def rate(count: Tensor) -> Tensor:
        t = (count + 1).to(torch.float64)
        corrected = (1 - torch.pow(b2, t)).sqrt()
        now = value_at("the learning-rate schedule", schedule, count) * corrected
        return now * (t / warm).clamp(max=1.0) if warm else now

    return chain(
        scale_by_rms(b2, eps),
        add_decayed_weights(weight_decay, mask),
        schedule_free(rate, b1),
    )


def schedule_free_params(state: TrainState) -> PyTree:
    r"""The averages x of schedule-free training, as parameters to evaluate.

    :math:`x = (y - (1 - \beta_1) z) / \beta_1`, with the parameters y of the state.

    Args:
      state: A state whose optimizer has one ``schedule_free`` in it; unsharded or
        placed.

    Returns:
      A tree like ``state.params``, in its dtypes and with its placement.

    Raises:
      TypeError: Something that is not a state.
      StructureError: The moments have no ``schedule_free`` in them, or several.

    Examples:
      >>> import zfunc as zf
      >>> step = zf.train_step(
      ...     lambda p, batch: (p * batch).sum(), schedule_free(1.0, b1=0.5)
      ... )
      >>> state, batch = zf.shard(torch.zeros(1), zf.make_mesh({})), torch.ones(1)
      >>> schedule_free_params(step(step(state, batch), batch)).buffer
      tensor([-1.5000])
    """
    found = only_moments(
        "schedule_free_params",
        state,
        ScheduleFreeMoments,
        "schedule_free_adamw(3e-4)",
    )

    def mean(z: Tensor, y: Tensor) -> Tensor:
        beta: Tensor = found.b1.to(z.dtype)
        return ((widen(y) - (1 - beta) * z) / beta).to(y.dtype)

    return tree_map(mean, found.z, state.params)
