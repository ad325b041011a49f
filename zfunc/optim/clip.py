# SPDX-License-Identifier: Apache-2.0
"""Bounds on the updates: by their norm over all ranks, or element by element."""

from torch import Tensor

from zfunc.core.sharding import global_norm
from zfunc.core.tree import PyTree, tree_map
from zfunc.optim.base import GradientTransformation, stateless, widen
from zfunc.optim.checks import check_number
from zfunc.optim.fused import scaled
from zfunc.optim.norms import tree_ordered_norm


def clip_by_global_norm(
    max_norm: float, *, deterministic: bool = False
) -> GradientTransformation:
    r"""Scale all updates by :math:`\min(1, c / (\|u\| + 10^{-6}))`.

    The norm is that of all leaves together, over all ranks (``core.global_norm``): the
    same coefficient on every rank. It costs a 0-d ``psum`` over each axis that shards
    leaves, and no host sync. Updates that are not finite are not skipped: they become
    NaN everywhere (NaN norm) or zeros and NaN (infinite norm).

    Args:
      max_norm: The bound c, above 0; in units of the gradient.
      deterministic: The same bits on any number of ranks, for
        ``partition(deterministic=True)``: squares are added up along a tree over the
        elements. It reads the gradients twice and sends one number per row of a leaf.

    Returns:
      A transformation without moments.

    Raises:
      TypeError: ``max_norm`` is not a number, or ``deterministic`` is not a bool.
      ValueError: ``max_norm`` is not above 0.

    Laws:
      The norm of the result is at most c, and does not depend on the placement; both
      to rounding.

    Examples:
      >>> import torch
      >>> tx, u = clip_by_global_norm(1.0), {"a": torch.tensor([3.0, 4.0])}
      >>> tx.update(u, (), u)[0]
      {'a': tensor([0.6000, 0.8000])}

    References:
      Pascanu et al., `On the difficulty of training recurrent neural networks
      <https://arxiv.org/abs/1211.5063>`_, 2013, algorithm 1.

    Differs from:
      The coefficient is that of ``torch.nn.utils.clip_grad_norm_`` and of DeepSpeed,
      1e-6 included, so updates just below the bound shrink by 1e-6 / c. optax has no
      1e-6 and leaves them alone.
    """
    bound = check_number(
        "clip_by_global_norm: max_norm",
        max_norm,
        above_low=True,
        instead="clip_by_global_norm(1.0)",
    )

    if not isinstance(deterministic, bool):
        raise TypeError(
            f"clip_by_global_norm: deterministic is a bool, got {deterministic!r}"
        )
    norm = tree_ordered_norm if deterministic else global_norm

    def coefficient(updates: PyTree) -> Tensor:
        return (bound / (norm(updates) + 1e-6)).clamp(max=1.0)

    return stateless(
        "clip_by_global_norm",
        lambda updates, params: scaled(updates, coefficient(updates)),
        leafwise=False,
        deterministic=deterministic,
    )._replace(factor=coefficient)


def clip_by_value(limit: float) -> GradientTransformation:
    r"""Clip every element to :math:`[-c, c]`. Changes the direction of the update.

    Args:
      limit: The bound c, above 0; in units of the gradient.

    Returns:
      A transformation without moments.

    Raises:
      TypeError: ``limit`` is not a number.
      ValueError: ``limit`` is not above 0.

    Laws:
      Idempotent, bitwise. NaN stays NaN.

    Examples:
      >>> import torch
      >>> u = torch.tensor([0.5, -7.0])
      >>> clip_by_value(1.0).update(u, (), u)[0]
      tensor([ 0.5000, -1.0000])

    Differs from:
      ``torch.nn.utils.clip_grad_value_`` has the same values; it accepts a negative
      limit, which is an error here.
    """
    bound = check_number(
        "clip_by_value: limit", limit, above_low=True, instead="clip_by_value(1.0)"
    )

    def clip(updates: PyTree, params: PyTree) -> PyTree:
        return tree_map(lambda u: widen(u).clamp(-bound, bound), updates)

    return stateless("clip_by_value", clip)
