# SPDX-License-Identifier: Apache-2.0
"""``assert_equivalent``: training in pieces is training whole, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from zfunc.core.errors import ZfuncError
from zfunc.core.mesh import make_mesh
from zfunc.core.state import TrainState, shard, unshard
from zfunc.core.tree import PyTree, leaves_with_path
from zfunc.testing.recipe import Recipe
from zfunc.testing.simulate import simulate, split_batch

FIELDS = ("params", "grads", "moments", "metrics", "step", "key")

TINY = torch.finfo(torch.float64).tiny


class EquivalenceError(ZfuncError, AssertionError):
    """Sharded training that is not unsharded training: when, where, by how much, how.

    Example:
      >>> try:
      ...     raise EquivalenceError("differs", 1, "params/w", 0.5, Recipe())
      ... except AssertionError as error:
      ...     print(error.step, error.path, error.difference)
      1 params/w 0.5
    """

    def __init__(
        self, message: str, step: int, path: str, difference: float, recipe: Recipe
    ) -> None:
        super().__init__(message)
        self.step, self.path = step, path
        self.difference, self.recipe = difference, recipe


class Difference(NamedTuple):
    """How far one leaf is from where it should be.

    ``excess`` is the largest ratio of a difference to what is allowed; above 1 is too
    much. ``largest`` is that difference, infinite where only one side is finite.
    """

    path: str
    largest: float
    excess: float


def differences(
    got: PyTree, want: PyTree, *, rtol: float = 0.0, atol: float = 0.0
) -> list[Difference]:
    """The leaves where ``|got - want| <= atol + rtol * |want|`` fails, worst first.

    Plain tensors, compared in float64; NaN equals NaN, and integers are not rounded. A
    leaf that only one tree has, or with another shape, is infinitely far away. The
    defaults ask for equality.

    Example:
      >>> differences({"w": torch.tensor([1.0, 2.5])}, {"w": torch.tensor([1.0, 2.0])})
      [Difference(path='w', largest=0.5, excess=inf)]
    """
    ours, theirs = dict(leaves_with_path(got)), dict(leaves_with_path(want))
    found = [
        _difference(path, ours.get(path), theirs.get(path), rtol, atol)
        for path in dict.fromkeys([*theirs, *ours])
    ]
    wrong = [d for d in found if d.excess > 1]
    return sorted(wrong, key=lambda d: (d.excess, d.largest), reverse=True)


def _difference(path: str, got: Any, want: Any, rtol: float, atol: float) -> Difference:
    if got is None or want is None or got.shape != want.shape:
        return Difference(path, math.inf, math.inf)
    if not got.numel():
        return Difference(path, 0.0, 0.0)
    a, b = got.detach().double(), want.detach().double()
    same = (got == want) | (a.isnan() & b.isnan())
    # Large integers may differ and yet round to the same float64.
    apart = (a - b).abs().clamp_min(TINY).nan_to_num(math.inf, math.inf)
    apart = torch.where(same, 0.0, apart)
    allowed = atol + rtol * b.abs() if want.is_floating_point() else b * 0
    excess = torch.where(apart == 0, 0.0, apart / allowed)
    excess = excess.nan_to_num(math.inf, math.inf)
    worst = excess.flatten().argmax()
    return Difference(path, float(apart.flatten()[worst]), float(excess.max()))


def assert_equivalent(
    loss_fn: Callable[..., Any] | None,
    params: PyTree,
    batches: Sequence[PyTree],
    recipe: Recipe,
    mesh_shape: Mapping[str, int],
    *,
    rtol: float = 1e-9,
    atol: float = 1e-12,
    key: int = 0,
    spec: Any = None,
) -> None:
    r"""Raise unless sharded training is unsharded training, at every step.

    :math:`\mathrm{unshard}(f'(\mathrm{shard}(s), b)) = f(s, b)` for parameters,
    gradients, moments and metrics, where :math:`f` trains on one rank with the whole
    batch at once and :math:`f'` follows ``recipe`` on every rank of a simulated mesh.
    The ranks must agree on the result bit for bit. Gradients are compared because Adam
    hides a wrong factor in them: its update does not depend on their scale.

    The defaults are for float64. In float32 the order of sums shows: expect 1e-5.

    Args:
      loss_fn: as for ``train_step``; None is the recipe's own ``tree_loss``. A plain
        scalar must be a mean over samples, and samples must not mix.
      params: a pytree of floating tensors.
      batches: one global batch per step; dim 0 of each tensor is a multiple of the
        ranks of ``recipe.axis`` times ``recipe.num_microbatches``.
      recipe: how to train.
      mesh_shape: axis sizes by name.
      rtol: what is allowed, relative to the unsharded value.
      atol: what is allowed besides, absolute.
      key: seed of the randomness, for a loss that takes a key.
      spec: where the parameters live, as for ``shard``; None is ``recipe.spec``.

    Raises:
      EquivalenceError: an ``AssertionError`` with the step, the path of the worst leaf,
        its largest difference and the recipe.

    Example:
      >>> def loss_fn(params, batch):
      ...     return (torch.tanh(batch["x"] @ params["w"]) - batch["y"]).square().mean()
      >>> batch = {"x": torch.randn(6, 4).double(), "y": torch.randn(6).double()}
      >>> params = {"w": torch.randn(4).double()}
      >>> recipe = Recipe(zero=3, optimizer="adam", clip=0.1)
      >>> assert_equivalent(loss_fn, params, [batch] * 2, recipe, {"data": 3})
    """
    tx = recipe.tx()
    reference = recipe.reference(loss_fn)
    sim = simulate(recipe.step(loss_fn), mesh_shape)
    whole = shard(params, make_mesh({}), tx=tx, key=key)
    where = recipe.spec if spec is None else spec
    pieces = sim.shard(params, tx=tx, spec=where, key=key)
    for step, batch in enumerate(batches, start=1):
        whole = reference(whole, batch)
        pieces = sim(pieces, split_batch(batch, mesh_shape, recipe.axis))
        views = [_compared(state) for state in sim.unshard_all(pieces)]
        want = _compared(unshard(whole))
        when = f"step {step} of {len(batches)}"
        for rank, view in enumerate(views[1:], start=1):
            # Not bitwise: sigmoid and its kin differ in the last bit between lanes.
            wrong = differences(view, views[0], rtol=rtol, atol=atol)
            _refuse(
                wrong,
                f"{when}: rank {rank} and rank 0 differ",
                step,
                recipe,
                mesh_shape,
            )
        wrong = differences(views[0], want, rtol=rtol, atol=atol)
        _refuse(
            wrong,
            f"{when}: sharded and unsharded training differ (rtol {rtol:g}, atol "
            f"{atol:g})",
            step,
            recipe,
            mesh_shape,
        )


def _compared(state: TrainState) -> dict[str, PyTree]:
    return {name: getattr(state, name) for name in FIELDS}


def _refuse(
    wrong: list[Difference],
    what: str,
    step: int,
    recipe: Recipe,
    mesh_shape: Mapping[str, int],
) -> None:
    if not wrong:
        return
    worst, *others = wrong
    more = f", and {len(others)} more leaves" if others else ""
    message = (
        f"{what}: {worst.path} by {worst.largest:.3g}{more}\n"
        f"  {recipe!r}\n  mesh {dict(mesh_shape)}"
    )
    raise EquivalenceError(message, step, worst.path, worst.largest, recipe)
