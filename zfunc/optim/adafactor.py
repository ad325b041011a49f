# SPDX-License-Identifier: Apache-2.0
"""Adafactor: Adam's mean squares of a matrix as one number per row and per column."""

import math
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from zfunc.core.sharding import P, is_sharded
from zfunc.core.tree import PyTree, pytree, tree_map, tree_structure, tree_unflatten
from zfunc.optim.base import (
    LEAF,
    GradientTransformation,
    chain,
    check_moments,
    check_updates,
    identity,
    new_count,
    widen,
    zeros_wide,
)
from zfunc.optim.checks import check_number
from zfunc.optim.decay import Mask, add_decayed_weights
from zfunc.optim.schedules import Schedule, constant, scale_by_learning_rate
from zfunc.optim.whole import (
    Part,
    buffer_of,
    outline_beside,
    placed_leaves,
    shape_of,
    spec_of,
    square_sum,
    sum_over_ranks,
    with_buffer,
    zeros_beside,
)


@pytree
class ScaleByAdafactorMoments:
    """What ``scale_by_adafactor`` remembers: the count, and means of squares.

    A leaf of shape (..., R, C) has ``rows`` of shape (..., R, 1) and ``columns`` of
    shape (..., 1, C), each sharded as the leaf is along the dims that they share. A
    vector or scalar has its elementwise mean squares in ``rows`` and an empty tensor
    in ``columns``.

    Examples:
      >>> moments = scale_by_adafactor().init(torch.ones(2, 3))
      >>> moments.rows.shape, moments.columns.shape
      (torch.Size([2, 1]), torch.Size([1, 3]))
    """

    count: Tensor
    rows: PyTree
    columns: PyTree


def scale_by_adafactor(
    b2_decay: float = -0.8,
    eps1: float = 1e-30,
    eps2: float = 1e-3,
    clip: float = 1.0,
) -> GradientTransformation:
    r"""Divide the updates by a factored root mean square; scale them to the parameters.

    With :math:`\rho_t = t^d`, for a matrix of R rows and C columns:

    .. math::
      r_t &= (1 - \rho_t) r_{t-1} + \rho_t \, \mathrm{mean}_\text{columns} (u_t^2) \\
      c_t &= (1 - \rho_t) c_{t-1} + \rho_t \, \mathrm{mean}_\text{rows} (u_t^2) \\
      v_t &= r_t c_t / \max(\mathrm{mean}(r_t), \epsilon_1), \quad
      w_t = u_t / \max(\sqrt{v_t}, \epsilon_1) \\
      u'_t &= \max(\epsilon_2, \mathrm{rms}(p)) \, w_t / \max(1, \mathrm{rms}(w_t) / k)

    A leaf of more dims is a stack of matrices in its last two; one of fewer keeps the
    mean of each square. Means are over whole leaves on all ranks, and padding does not
    count. They cost two messages over each axis that shards leaves: one with the sums
    over sharded dims of all leaves, one with a number per leaf.

    Args:
      b2_decay: d, at most 0; the mean squares decay by :math:`1 - t^d`.
      eps1: :math:`\epsilon_1`, above 0: bounds both denominators.
      eps2: :math:`\epsilon_2`, at least 0: the size of parameters that are near 0.
      clip: k, above 0: bounds the root mean square of the update of each leaf.

    Returns:
      A transformation with ``ScaleByAdafactorMoments``, in float32 at least.

    Raises:
      TypeError: A hyper-parameter that is not a number.
      ValueError: One out of its range.
      StructureError: (from ``update``) the moments of something else.

    Laws:
      The same on any mesh, to rounding. Padding stays zero, in the moments too.

    Examples:
      >>> tx, p = scale_by_adafactor(), torch.full((2, 2), 0.5)
      >>> u = torch.tensor([[1.0, -10.0], [2.0, -20.0]])  # of rank 1: nothing is lost
      >>> tx.update(u, tx.init(p), p)[0]
      tensor([[ 0.5000, -0.5000],
              [ 0.5000, -0.5000]])

    References:
      Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018,
      algorithms 4 and 5.

    Differs from:
      The paper adds :math:`\epsilon_1` to the squares. Where it bounds the denominators
      is torch's choice, whose default is the machine epsilon of the parameters' dtype
      instead of the paper's 1e-30: with float32 gradients below 3e-4 that is no longer
      the formula of the paper.
    """
    name = "scale_by_adafactor"
    decay = _check_decay(b2_decay)
    eps1 = check_number(f"{name}: eps1", eps1, above_low=True, instead="eps1=1e-30")
    eps2 = check_number(f"{name}: eps2", eps2, instead="eps2=1e-3")
    bound = check_number(f"{name}: clip", clip, above_low=True, instead="clip=1.0")

    def init(params: PyTree) -> PyTree:
        rows, columns = _factors(params, zeros_beside)
        return ScaleByAdafactorMoments(new_count(params), rows, columns)

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_updates(params, updates)
        expected = ScaleByAdafactorMoments(LEAF, *_factors(params, outline_beside))
        check_moments("scale_by_adafactor", expected, moments)
        count = moments.count + 1
        new = torch.pow(count.to(torch.float64), decay)
        leaves, grads = placed_leaves(params), placed_leaves(updates)
        factors = [placed_leaves(tree) for tree in (moments.rows, moments.columns)]
        parts = [square_sum(p) for p in leaves]
        for u, rows in zip(grads, factors[0], strict=True):
            parts += _parts(u, rows)
        sums = sum_over_ranks(parts)
        sizes, rest = sums[: len(leaves)], iter(sums[len(leaves) :])
        made = [
            _divided(u, rows, columns, rest, new, eps1)
            for u, rows, columns in zip(grads, *factors, strict=True)
        ]
        squares = sum_over_ranks([square_sum(w) for w, _, _ in made])
        scaled = [
            _scaled(w, eps2, bound, size, square)
            for (w, _, _), size, square in zip(made, sizes, squares, strict=True)
        ]
        spec = tree_structure(updates, is_sharded)
        columns_of_made = zip(*made, strict=True) if made else ((), (), ())
        _, *after = (tree_unflatten(spec, column) for column in columns_of_made)
        return tree_unflatten(spec, scaled), ScaleByAdafactorMoments(count, *after)

    return GradientTransformation(init, update)


def _is_factored(leaf: Any) -> bool:
    return len(shape_of(leaf)) >= 2


def _factors(params: PyTree, make: Callable[..., Any]) -> tuple[PyTree, PyTree]:
    """The trees ``rows`` and ``columns`` of the moments, made by ``make``."""
    rows, columns = [], []
    for leaf in placed_leaves(params):
        shape, spec = shape_of(leaf), spec_of(leaf)
        if _is_factored(leaf):
            rows.append(make(leaf, P(*spec[:-1]), (*shape[:-1], 1)))
            reduced = (*spec[:-2], None, spec[-1])
            columns.append(make(leaf, P(*reduced), (*shape[:-2], 1, shape[-1])))
        else:
            rows.append(make(leaf, P(*spec), shape))
            columns.append(make(leaf, P(), (0,)))
    outline = tree_structure(params, is_sharded)
    return tree_unflatten(outline, rows), tree_unflatten(outline, columns)


def _parts(u: Any, rows: Any) -> list[Part]:
    """This rank's parts of the sums that a matrix needs; none for a vector."""
    if not _is_factored(u):
        return []
    square, before = widen(buffer_of(u)).square(), buffer_of(rows)
    of_rows = square.sum(-1, keepdim=True)
    return [
        Part(of_rows, u, (-1,)),
        Part(square.sum(-2, keepdim=True), u, (-2,)),
        Part(of_rows.sum(-2, keepdim=True), u, (-2, -1)),
        Part(before.sum(-2, keepdim=True), u, (-2,)),
    ]


def _num_elements(leaf: Any, *dims: int) -> int:
    """What a sum over these dims is divided by: padding is not counted."""
    return max(math.prod(shape_of(leaf)[dim] for dim in dims), 1)


def _divided(
    u: Any, rows: Any, columns: Any, sums: Iterator[Tensor], new: Tensor, eps1: float
) -> tuple[Any, Any, Any]:
    """The update over its root mean square, and the new factors of that."""
    wide, before = widen(buffer_of(u)), buffer_of(rows)
    rho = new.to(wide.dtype)
    if not _is_factored(u):
        squares = (1 - rho) * before + rho * wide.square()
        divided = wide / squares.sqrt().clamp(min=eps1)
        return with_buffer(u, divided), with_buffer(rows, squares), columns
    num_rows, num_columns = _num_elements(u, -2), _num_elements(u, -1)
    of_rows, of_columns, of_all, of_before = (next(sums) for _ in range(4))
    r = (1 - rho) * before + rho * (of_rows / num_columns)
    c = (1 - rho) * buffer_of(columns) + rho * (of_columns / num_rows)
    mean = (1 - rho) * (of_before / num_rows)
    mean = mean + rho * (of_all / (num_rows * num_columns))
    # Divided first: a product of two small squares would be 0 in float32.
    root = ((r / mean.clamp(min=eps1)) * c).sqrt().clamp(min=eps1)
    return with_buffer(u, wide / root), with_buffer(rows, r), with_buffer(columns, c)


def _scaled(w: Any, eps2: float, bound: float, size: Tensor, square: Tensor) -> Any:
    """The update in proportion to the parameters, whose sum of squares is ``size``."""
    num_elements = _num_elements(w, *range(len(shape_of(w))))
    parameters = (size / num_elements).sqrt().clamp(min=eps2)
    clipped = ((square / num_elements).sqrt() / bound).clamp(min=1.0)
    wide = buffer_of(w)
    return with_buffer(w, wide * (parameters / clipped).to(wide.dtype))


def adafactor(
    learning_rate: float | Schedule = 1e-2,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    *,
    b2_decay: float = -0.8,
    eps1: float = 1e-30,
    eps2: float = 1e-3,
    clip: float = 1.0,
    mask: Mask | None = None,
) -> GradientTransformation:
    r"""Adafactor: steps relative to the parameters, mean squares factored.

    .. math::
      p_{t+1} = (1 - \eta_t \lambda) p_t - \min(\eta_t, t^{-1/2}) \, u'_t

    with :math:`u'_t` from ``scale_by_adafactor``; the rate is relative to the size of
    each leaf.
    Memory: R + C numbers for a matrix of R rows and C columns, instead of Adam's 2RC;
    with momentum RC more.

    Args:
      learning_rate: :math:`\eta`, at least 0, or a schedule; the relative step is at
        most :math:`t^{-1/2}`.
      momentum: Decay of a running mean of the steps, in [0, 1); 0 keeps no buffer.
      weight_decay: :math:`\lambda`, at least 0; decoupled.
      b2_decay: At most 0; the mean squares decay by :math:`1 - t^d`.
      eps1: Bounds the denominators, above 0.
      eps2: The size of parameters that are near 0, at least 0.
      clip: Bounds the root mean square of the update of each leaf, above 0.
      mask: Which leaves decay, ``(path, leaf) -> bool``; all if None.

    Returns:
      The optimizer: ``chain(scale_by_adafactor, scale_by_learning_rate)``, then the
      momentum and the weight decay.

    Raises:
      TypeError: A hyper-parameter of the wrong kind.
      ValueError: One out of its range.

    Laws:
      ``torch.optim.Adafactor`` to rounding, at every step, given the same
      hyper-parameters and no momentum; the same on any mesh.

    Examples:
      >>> from zfunc.optim import apply_updates
      >>> tx, p = adafactor(), torch.full((2, 2), 0.5)
      >>> updates, moments = tx.update(torch.ones(2, 2), tx.init(p), p)
      >>> apply_updates(p, updates)
      tensor([[0.4950, 0.4950],
              [0.4950, 0.4950]])

    References:
      Shazeer and Stern, `Adafactor <https://arxiv.org/abs/1804.04235>`_, 2018.

    Differs from:
      ``torch.optim.Adafactor`` has no momentum, and other defaults of ``eps1``.
      DeepSpeed has no Adafactor of its own.
    """
    keep = check_number(
        "adafactor: momentum", momentum, high=1.0, instead="momentum=0.9"
    )
    rate = scale_by_learning_rate(learning_rate)
    return chain(
        scale_by_adafactor(b2_decay, eps1, eps2, clip),
        scale_by_learning_rate(_at_most_inverse_root(learning_rate)),
        _running_mean(keep) if keep else identity(),
        _decay_at_rate(rate, weight_decay, mask),
    )


def _at_most_inverse_root(learning_rate: float | Schedule) -> Schedule:
    """The schedule min(rate(step), 1 / sqrt(step + 1))."""
    schedule = learning_rate if callable(learning_rate) else constant(learning_rate)

    def relative(step: Tensor) -> Any:
        highest = (step.to(torch.float64) + 1).rsqrt()
        rate: Any = schedule(step)
        if isinstance(rate, Tensor):
            return torch.minimum(rate.to(torch.float64), highest)
        number = isinstance(rate, Real) and not isinstance(rate, bool)
        return highest.clamp(max=float(rate)) if number else rate

    return relative


def _running_mean(keep: float) -> GradientTransformation:
    """Replace the updates by a running mean of them, from 0."""

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_moments("adafactor: momentum", updates, moments)
        mean = tree_map(
            lambda m, u: keep * m + (1 - keep) * u.to(m.dtype), moments, updates
        )
        return mean, mean

    return GradientTransformation(zeros_wide, update, leafwise=True)


def _decay_at_rate(
    scale: GradientTransformation, weight_decay: float, mask: Mask | None
) -> GradientTransformation:
    """Subtract the decay at a learning rate that is not that of the updates."""
    decay = add_decayed_weights(weight_decay, mask)
    if not weight_decay:
        return decay

    def init(params: PyTree) -> PyTree:
        decay.init(params)  # a wrong mask is found here
        return scale.init(params)

    def update(
        updates: PyTree, moments: PyTree, params: PyTree
    ) -> tuple[PyTree, PyTree]:
        check_updates(params, updates)
        nothing = tree_map(lambda p: torch.zeros_like(widen(p)), params)
        decayed, _ = decay.update(nothing, (), params)
        scaled, after = scale.update(decayed, moments, params)
        return tree_map(torch.add, updates, scaled), after

    return GradientTransformation(init, update, leafwise=True)


def _check_decay(b2_decay: Any) -> float:
    expected = "expected a number in (-inf, 0]; type for example b2_decay=-0.8"
    if isinstance(b2_decay, bool) or not isinstance(b2_decay, Real):
        kind = type(b2_decay).__name__
        raise TypeError(f"scale_by_adafactor: b2_decay is a {kind}, {expected}")
    number = float(b2_decay)
    if not -math.inf < number <= 0:
        raise ValueError(f"scale_by_adafactor: b2_decay is {b2_decay!r}, {expected}")
    return number
