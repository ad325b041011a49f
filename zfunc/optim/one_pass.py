# SPDX-License-Identifier: Apache-2.0
"""``adam``, ``adamw``, ``lion`` and ``sgd`` as a pass from gradient to parameter.

Each of them is a direction, a decay and a learning rate (LAMB's trust ratio is one more
part). ``one_pass`` reads the moments of these parts, has a rule run the kernel, and
puts together what the parts of the chain would have returned.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, tree_leaves, tree_structure, tree_unflatten
from zfunc.kernels.adamw import adamw as adamw_kernel
from zfunc.kernels.lion import lion as lion_kernel
from zfunc.kernels.sgd import sgd as sgd_kernel
from zfunc.optim.base import LEAF, check_moments, check_updates
from zfunc.optim.decay import Mask, picked
from zfunc.optim.fused import Fused, Kernels, applies_to, chosen
from zfunc.optim.scale_by_adam import ScaleByAdamMoments, bias_weights
from zfunc.optim.scale_by_lion import ScaleByLionMoments
from zfunc.optim.schedule_values import factor_at, value_at
from zfunc.optim.schedules import (
    ScaleByLearningRateMoments,
    Schedule,
    as_schedule,
)
from zfunc.optim.trace import TraceMoments

# (moments of the direction, params, grads, options of the kernel)
# -> (the leaves of the new params, new moments of the direction)
Rule = Callable[[Any, PyTree, PyTree, dict[str, Any]], tuple[Any, Any]]


def one_pass(
    name: str,
    learning_rate: float | Schedule,
    weight_decay: float,
    mask: Mask | None,
    kernels: Kernels,
    outline: Callable[[PyTree], PyTree],
    rule: Rule,
) -> Fused:
    """The step of a chain of a direction, a decay and a learning rate.

    Args:
      name: The optimizer; of "adam" and "sgd" the decay comes before the direction, of
        "lamb" there is a trust ratio before the learning rate.
      learning_rate: As in the optimizer; the chain has checked it, and what follows.
      weight_decay: Likewise.
      mask: Likewise.
      kernels: Which implementation, see ``applies_to``.
      outline: The structure of the direction's moments, from that of the updates.
      rule: Runs the kernel.

    Returns:
      The step.

    Laws:
      What the rule promises: the bits of the chain of these parts, ``apply_updates``
      included (of LAMB within the roundings of its norms).
    """
    schedule, place = as_schedule(learning_rate), int(name in ("adam", "sgd"))
    units: list[PyTree] = [()] * (3 if name == "lamb" else 2)

    def step(
        updates: PyTree,
        moments: PyTree,
        params: PyTree,
        finite: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> tuple[PyTree, PyTree]:
        check_updates(params, updates)
        expected = [*units, ScaleByLearningRateMoments(LEAF)]
        expected[place] = outline(updates)
        check_moments(name, tuple(expected), moments)
        before, rate = moments[place], moments[-1]
        options = {
            "learning_rate": rate_at(schedule, rate.count),
            "weight_decay": decays(weight_decay, mask, params),
            "coefficient": factor,
            "finite": finite,
            "kernel": kernels,
        }
        leaves, new = rule(before, params, updates, options)
        count = chosen(finite, rate.count + 1, rate.count)
        after = [*units, ScaleByLearningRateMoments(count)]
        after[place] = new
        return like(params, leaves), tuple(after)

    on_cpu = name in ("adam", "adamw")
    return Fused(applies_to(name, kernels, on_cpu=on_cpu), step)


def adam_rule(b1: float | Schedule, b2: float, eps: float, *, coupled: bool) -> Rule:
    """Adam's direction, its decay ``coupled`` or not."""

    def rule(
        adam: Any, params: PyTree, grads: PyTree, options: dict[str, Any]
    ) -> tuple[Any, Any]:
        keep = at_hand(factor_at("scale_by_adam: b1", b1, adam.count), adam.count)
        weight1, weight2 = bias_weights(keep, b2, adam.count + 1)
        done = adamw_kernel(
            *map(tree_leaves, (params, grads, adam.mu, adam.nu)),
            weight1=weight1,
            weight2=weight2,
            b1=keep,
            b2=b2,
            eps=eps,
            coupled=coupled,
            **options,
        )
        count = chosen(options["finite"], adam.count + 1, adam.count)
        mu, nu = like(adam.mu, done.mu), like(adam.nu, done.nu)
        return done.params, ScaleByAdamMoments(count, mu, nu)

    return rule


def adam_outline(updates: PyTree) -> PyTree:
    """The structure of Adam's moments."""
    return ScaleByAdamMoments(LEAF, updates, updates)


def lion_rule(b1: float, b2: float) -> Rule:
    """Lion's direction."""

    def rule(
        lion: Any, params: PyTree, grads: PyTree, options: dict[str, Any]
    ) -> tuple[Any, Any]:
        lists = map(tree_leaves, (params, grads, lion.mu))
        done = lion_kernel(*lists, b1=b1, b2=b2, **options)
        return done.params, ScaleByLionMoments(like(lion.mu, done.mu))

    return rule


def sgd_rule(momentum: float | Schedule, dampening: float, *, nesterov: bool) -> Rule:
    """The trace of ``sgd``, or none for a momentum of 0."""

    def rule(
        trace: Any, params: PyTree, grads: PyTree, options: dict[str, Any]
    ) -> tuple[Any, Any]:
        if trace == ():
            lists = map(tree_leaves, (params, grads))
            return sgd_kernel(*lists, **options).params, ()
        keep = factor_at("trace: momentum", momentum, trace.count)
        done = sgd_kernel(
            *map(tree_leaves, (params, grads, trace.trace)),
            momentum=at_hand(keep, trace.count),
            gain=1.0 - dampening * (trace.count > 0).to(torch.float64),
            nesterov=nesterov,
            **options,
        )
        count = chosen(options["finite"], trace.count + 1, trace.count)
        return done.params, TraceMoments(count, like(trace.trace, done.trace))

    return rule


def rate_at(schedule: Schedule, count: Tensor) -> float | Tensor:
    """The value of the learning-rate schedule, as a kernel reads it."""
    return at_hand(value_at("the learning-rate schedule", schedule, count), count)


def at_hand(factor: float | Tensor, count: Tensor) -> float | Tensor:
    """A factor that a schedule made, floating and on the device of the count.

    Elementwise calls take 0-d tensors of the CPU as they are; a kernel cannot.

    Examples:
      >>> at_hand(torch.tensor(1), torch.tensor(3))
      tensor(1., dtype=torch.float64)
    """
    if not isinstance(factor, Tensor):
        return factor
    wide = factor if factor.is_floating_point() else factor.to(torch.float64)
    return wide.to(count.device, non_blocking=True)


def like(tree: PyTree, leaves: list[Tensor]) -> PyTree:
    """A tree of the structure of another."""
    return tree_unflatten(tree_structure(tree), leaves)


def decays(decay: float, mask: Mask | None, params: PyTree) -> float | list[float]:
    """The decay of each leaf, or one number for all of them.

    Args:
      decay: The decay of those that the mask picks.
      mask: Which these are; None is all.
      params: The parameters.

    Examples:
      >>> from zfunc.optim.decay import decay_matrices
      >>> decays(0.1, decay_matrices, [torch.ones(2), torch.ones(2, 2)])
      [0.0, 0.1]
    """
    if mask is None or decay == 0:
        return float(decay)
    return [float(decay) if pick else 0.0 for pick in tree_leaves(picked(mask, params))]
