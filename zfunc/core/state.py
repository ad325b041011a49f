# SPDX-License-Identifier: Apache-2.0
"""The training state: an immutable pytree of parameters, gradients and moments."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch

from zfunc.core import collectives, wire
from zfunc.core.errors import DonatedBufferError, PlacementError
from zfunc.core.mesh import Mesh
from zfunc.core.random import fold_in
from zfunc.core.sharding import P, is_sharded, place_tree, replicate
from zfunc.core.tree import (
    PyTree,
    check_floating,
    leaves_with_path,
    pytree,
    tree_flatten,
    tree_leaves,
    tree_map,
)


@pytree
class Mean:
    r"""A mean that stays exact over microbatches and ranks: a total and its weight.

    A loss that returns ``Mean(total, weight)`` is trained on
    :math:`\sum_i t_i / \sum_i w_i` over all microbatches and ranks. (A mean of means is
    biased when the weights, say token counts, differ.) Both are 0-d; the weight must
    not depend on the parameters.

    Example:
      >>> Mean(torch.tensor(6.0), torch.tensor(3.0)).value()
      tensor(2.)
    """

    total: torch.Tensor
    weight: torch.Tensor

    def value(self) -> torch.Tensor:
        """``total / weight``, and 0 where the weight is 0 (nothing was counted)."""
        return self.total / torch.where(self.weight == 0, 1, self.weight)


@pytree
class Metrics:
    """What the last step measured: 0-d tensors, already reduced over the mesh.

    Reading one (``float(state.metrics.loss)``) is the only host sync of a step.
    ``skipped`` is 1 if the update was left out because its gradients were not finite
    (with a loss scale or ``skip_nonfinite``), else 0.

    Example:
      >>> loss, zero = torch.tensor(1.5), torch.tensor(0)
      >>> Metrics(loss, torch.tensor(0.1), zero, {}).loss
      tensor(1.5000)
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor
    aux: PyTree


@pytree
class TrainState:
    """The state of training: frozen, and no functions inside.

    ``grads`` are those of the last step, reduced, before the optimizer saw them.
    ``moments`` is the optimizer's memory: None until the first step, if ``shard`` was
    not given the optimizer. ``loss_scale`` is that of a step with one: None until then.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> shard({"w": torch.ones(2)}, make_mesh({})).step
      tensor(0)
    """

    step: torch.Tensor
    params: PyTree
    grads: PyTree
    moments: PyTree
    loss_scale: PyTree
    key: torch.Tensor
    metrics: Metrics

    def replace(self, **changes: Any) -> TrainState:
        """The state with some fields replaced."""
        return dataclasses.replace(self, **changes)


def shard(
    params: PyTree,
    mesh: Mesh,
    *,
    tx: Any = None,
    spec: Any = None,
    dtype: torch.dtype | None = None,
    key: int = 0,
) -> TrainState:
    r"""The initial state: every rank keeps its piece of ``params`` and of the moments.

    With :math:`\Psi` parameters on n ranks the state holds :math:`16\Psi/n` bytes in
    float32 (parameters, gradients, two Adam moments), whatever the ZeRO stage: the
    stage is only where in the step the gathers and reductions sit.

    Args:
      params: a pytree of floating tensors, the same on every rank. Leaves that are
        ``Sharded`` on ``mesh``, as a loader that reads pieces makes them, stay where
        they are (copied: a donating step may not reach the caller's).
      mesh: where they go.
      tx: makes the moments now; else the step makes them on its first call.
      spec: a ``P`` for all leaves (cut to each leaf's dims: scalars replicate), or a
        tree of them. Default ``P("data")``, or ``P()`` on a mesh without axes.
      dtype: storage dtype; None keeps each leaf's.
      key: seed of the randomness that the loss receives.

    Raises:
      TypeError: a leaf that is not a floating tensor, with its path.
      MeshError: an axis that the mesh does not have.
      PlacementError: ranks that hold different parameters (unequal seeds), with the
        path of the first leaf; a leaf that is placed on another mesh, or a spec for
        leaves that are placed.

    Differs from DeepSpeed: no engine; checkpoints do not depend on the stage, which may
    change at any step.

    References:
      Rajbhandari et al., `ZeRO <https://arxiv.org/abs/1910.02054>`_, 2020, section 5.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> state = shard({"w": torch.ones(4, 2)}, make_mesh({"data": 1}))
      >>> state.params["w"].sharding.spec
      P('data')
    """
    _check_options(params, mesh, tx, dtype, key)
    check_floating(params, "params")
    if not tree_leaves(params):
        raise TypeError("params has no leaves: there is nothing to train.")
    plain = tree_map(lambda x: None if is_sharded(x) else x, params, is_leaf=is_sharded)
    if spec is None:
        spec = P("data") if mesh.axes else P()
    elif len(tree_leaves(plain)) < len(tree_leaves(params)):
        raise PlacementError(
            "params are placed already: give spec= to what placed them (from_hf)."
        )
    if mesh.kind == "process" and tree_leaves(plain):
        _check_agreement(plain, mesh)
    placed = place_tree(params, mesh, spec, dtype)
    first = tree_leaves(placed)[0]
    counter = first.new_zeros((), dtype=torch.int64)
    zero = counter.to(torch.promote_types(first.dtype, torch.float32))
    return TrainState(
        step=counter,
        params=placed,
        grads=tree_map(torch.zeros_like, placed),
        moments=None if tx is None else tx.init(placed),
        loss_scale=None,
        key=torch.full_like(counter, int(key)),
        metrics=Metrics(zero, zero, counter, {}),
    )


def _check_options(params: PyTree, mesh: Any, tx: Any, dtype: Any, key: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(f"shard takes a mesh made by zf.make_mesh, got {mesh!r}")
    if tx is not None and not callable(getattr(tx, "init", None)):
        raise TypeError(f"tx must be a GradientTransformation, got {tx!r}")
    if dtype is not None and not (
        isinstance(dtype, torch.dtype) and dtype.is_floating_point
    ):
        raise TypeError(
            f"the storage dtype is a floating torch.dtype such as torch.bfloat16, got "
            f"{dtype!r}"
        )
    if isinstance(key, float) or not hasattr(key, "__index__"):
        raise TypeError(f"key is an integer seed, got {key!r}")
    if mesh.kind == "abstract":
        wire.check_fake(mesh, tree_leaves(params))


def unshard(state: TrainState) -> TrainState:
    """The same state with full plain tensors of its own, on every rank.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> unshard(shard({"w": torch.ones(2)}, make_mesh({"data": 1}))).params
      {'w': tensor([1., 1.])}
    """

    def own(leaf: Any, full: torch.Tensor) -> torch.Tensor:
        axes = leaf.sharding.axes if is_sharded(leaf) else ()
        sizes = [leaf.sharding.mesh.axis_size(axis) for axis in axes]
        return full if max(sizes, default=1) > 1 else full.clone()

    full: TrainState = tree_map(own, state, replicate(state), is_leaf=is_sharded)
    return full


def _check_agreement(params: PyTree, mesh: Mesh) -> None:
    """Ranks that start from different numbers would train different models silently."""
    leaves, _ = tree_flatten(params)
    if any(isinstance(x, torch._subclasses.FakeTensor) for x in leaves):
        return
    described = [f"{p}:{tuple(x.shape)}:{x.dtype}" for p, x in leaves_with_path(params)]
    digest = hashlib.sha256("\n".join(described).encode()).digest()
    names = _of_all_ranks(torch.tensor([int.from_bytes(digest[:7])]), mesh)
    if bool((names != names[:1]).any()):
        raise PlacementError(
            f"params has other leaves, shapes or dtypes on other ranks of the mesh "
            f"{mesh.shape}: make the same parameters on every rank."
        )
    rows = _of_all_ranks(torch.stack([_fingerprint(x) for x in leaves]), mesh)
    agree = (rows == rows[:1]).all(0)
    if not bool(agree.all()):
        paths = [path for path, _ in leaves_with_path(params)]
        raise PlacementError(
            f"params[{paths[int((~agree).int().argmax())]!r}] differs between the "
            f"{mesh.size} ranks of the mesh {mesh.shape}: make the parameters with the "
            "same seed on every rank, or load the same file."
        )


def _of_all_ranks(mine: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """One row per rank of the whole mesh, on every rank: all of them judge alike."""
    rows = mine.to(mesh.device).unsqueeze(0)
    for axis, _ in mesh.axes:
        rows = collectives.all_gather(rows, axis, mesh)
    return rows


def _fingerprint(x: torch.Tensor) -> torch.Tensor:
    """A hash of the bits of ``x`` that does not depend on the order of the sum."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = x.detach().contiguous().view(-1).view(integers[x.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), 2**20):  # hashes are 8 bytes an element
        chunk = bits[start : start + 2**20].to(torch.int64)
        place = torch.arange(start, start + chunk.numel(), device=bits.device)
        total = total + fold_in(chunk, place).sum()
    return total


def check_usable(state: Any) -> TrainState:
    """The argument of a step, or an error that says what it is instead.

    Example:
      >>> check_usable({"w": torch.ones(1)})
      Traceback (most recent call last):
      TypeError: a step takes the TrainState made by zf.shard(params, mesh), got a dict.
    """
    if not isinstance(state, TrainState):
        raise TypeError(
            "a step takes the TrainState made by zf.shard(params, mesh), got a "
            f"{type(state).__name__}."
        )
    for tree in (state.params, state.moments):
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Donated):
                leaf.refuse()
    return state


class Donated(torch.Tensor):
    """What is left of a buffer that a donating step consumed: every use raises."""

    _message: str

    @staticmethod
    def __new__(cls: Any, path: str) -> Donated:
        """A tensor without memory that knows the path it was at."""
        made: Donated = torch.Tensor._make_wrapper_subclass(cls, ())
        made._message = (
            f"{path} was donated to a step and its memory reused: keep the state that "
            "the step returned (state = step(state, batch)), or do not donate."
        )
        return made

    def __repr__(self, **_: Any) -> Any:  # type: ignore[override]
        return f"<{self._message.split(':')[0]}>"

    def refuse(self) -> None:
        """Raise ``DonatedBufferError`` with the leaf's path."""
        raise DonatedBufferError(self._message)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Every torch function, method and attribute: an error."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Donated):
                leaf.refuse()
        raise DonatedBufferError("a donated buffer was used")

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]
