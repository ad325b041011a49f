# SPDX-License-Identifier: Apache-2.0
"""``lamb`` in two passes: the norms of whole leaves stand between them."""

from typing import Any

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, tree_leaves
from zfunc.kernels.lamb import lamb_apply, lamb_moments, trust_ratios
from zfunc.optim.fused import chosen
from zfunc.optim.one_pass import Rule, like
from zfunc.optim.scale_by_adam import ScaleByAdamMoments, bias_weights
from zfunc.optim.whole import Part, placed_leaves, sum_over_ranks


def lamb_rule(
    b1: float,
    b2: float,
    eps: float,
    *,
    bias_correction: bool,
    max_coeff: float,
    min_coeff: float,
) -> Rule:
    """LAMB's direction and trust ratios.

    The chain within the roundings of a norm: its squares are added up in another order.
    With equal norms its bits.
    """

    def rule(
        adam: Any, params: PyTree, grads: PyTree, options: dict[str, Any]
    ) -> tuple[Any, Any]:
        options = dict(options)
        rate, factor = options.pop("learning_rate"), options.pop("coefficient")
        count = adam.count + 1
        weight1, weight2 = bias_weights(b1, b2, count) if bias_correction else (1, 1)
        options |= {"weight1": weight1, "weight2": weight2, "eps": eps}
        leaves, *lists = map(tree_leaves, (params, grads, adam.mu, adam.nu))
        new = lamb_moments(leaves, *lists, b1=b1, b2=b2, coefficient=factor, **options)
        ratios = trust_ratios(
            _over_ranks(new.sums, params),
            max_coeff=max_coeff,
            min_coeff=min_coeff,
            kernel=options["kernel"],
        )
        done = lamb_apply(leaves, new.mu, new.nu, ratios, learning_rate=rate, **options)
        count = chosen(options["finite"], count, adam.count)
        mu, nu = like(adam.mu, new.mu), like(adam.nu, new.nu)
        return done.params, ScaleByAdamMoments(count, mu, nu)

    return rule


def _over_ranks(sums: Tensor, params: PyTree) -> Tensor:
    """Sums of squares of pieces of leaves, added up over the ranks that hold them."""
    pairs = zip(sums, placed_leaves(params), strict=True)
    return torch.stack(sum_over_ranks([Part(x, leaf) for x, leaf in pairs]))
