# SPDX-License-Identifier: Apache-2.0
"""``lamb`` in two passes: the norms of whole leaves stand between them."""

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, tree_leaves
from zfunc.kernels.lamb import lamb_apply, lamb_moments, trust_ratios
from zfunc.optim.base import LEAF, check_moments, check_updates
from zfunc.optim.decay import Mask
from zfunc.optim.fused import Fused, Kernels, applies_to, chosen
from zfunc.optim.one_pass import decays, like, rate_at
from zfunc.optim.scale_by_adam import ScaleByAdamMoments, bias_weights
from zfunc.optim.schedules import ScaleByLearningRateMoments, Schedule, as_schedule
from zfunc.optim.whole import Part, placed_leaves, sum_over_ranks


def two_passes(
    learning_rate: float | Schedule,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    mask: Mask | None,
    bias_correction: bool,
    bounds: tuple[float, float],
    kernels: Kernels,
) -> Fused:
    """The step of ``lamb``'s chain.

    Args:
      learning_rate: As in ``lamb``; the chain has checked it, and what follows.
      betas: Likewise, ``b1`` and ``b2``.
      eps: Likewise.
      weight_decay: Likewise.
      mask: Likewise.
      bias_correction: Likewise.
      bounds: Likewise, ``max_coeff`` and ``min_coeff``.
      kernels: Which implementation, see ``applies_to``.

    Returns:
      The step.

    Laws:
      The chain within the roundings of a norm: its squares are added up in another
      order. With equal norms its bits.
    """
    schedule, (b1, b2) = as_schedule(learning_rate), betas

    def step(
        updates: PyTree,
        moments: PyTree,
        params: PyTree,
        finite: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> tuple[PyTree, PyTree]:
        check_updates(params, updates)
        means = ScaleByAdamMoments(LEAF, updates, updates)
        check_moments(
            "lamb", (means, (), (), ScaleByLearningRateMoments(LEAF)), moments
        )
        adam, rate, leaves = moments[0], moments[3], tree_leaves(params)
        corrected = bias_weights(b1, b2, adam.count + 1) if bias_correction else (1, 1)
        shared = {
            "weight1": corrected[0],
            "weight2": corrected[1],
            "eps": eps,
            "weight_decay": decays(weight_decay, mask, params),
            "finite": finite,
            "kernel": "triton",
        }
        new = lamb_moments(
            *map(tree_leaves, (params, updates, adam.mu, adam.nu)),
            b1=b1,
            b2=b2,
            coefficient=factor,
            **shared,
        )
        ratios = trust_ratios(
            _over_ranks(new.sums, params),
            max_coeff=bounds[0],
            min_coeff=bounds[1],
            kernel="triton",
        )
        value = rate_at(schedule, rate.count)
        done = lamb_apply(
            *(leaves, new.mu, new.nu, ratios), learning_rate=value, **shared
        )
        count, next_rate = chosen(
            finite, (adam.count + 1, rate.count + 1), (adam.count, rate.count)
        )
        mu, nu = like(adam.mu, new.mu), like(adam.nu, new.nu)
        means = ScaleByAdamMoments(count, mu, nu)
        after = (means, (), (), ScaleByLearningRateMoments(next_rate))
        return like(params, done.params), after

    return Fused(applies_to("lamb", kernels), step)


def _over_ranks(sums: Tensor, params: PyTree) -> Tensor:
    """Sums of squares of pieces of leaves, added up over the ranks that hold them."""
    pairs = zip(sums, placed_leaves(params), strict=True)
    return torch.stack(sum_over_ranks([Part(x, leaf) for x, leaf in pairs]))
