# SPDX-License-Identifier: Apache-2.0
"""``partition``: ZeRO, as the places in a step where the gather and the reduce sit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from zfunc.core import collectives, wire
from zfunc.core.errors import PlacementError
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import (
    NamedSharding,
    Sharded,
    gather_buffers,
    is_sharded,
    scatter_sum_buffers,
)
from zfunc.core.step import GradFn, TrainStep, Transform
from zfunc.core.tally import LossFn, Samples, Tally, named
from zfunc.core.tree import (
    PyTree,
    leaves_with_path,
    pytree,
    static,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from zfunc.transforms.fixed_order import in_fixed_order
from zfunc.transforms.gathered import Wire, gather_on_use


@pytree
class Whole:
    """A leaf that is whole for the length of a step, and the layout it goes back to."""

    buffer: torch.Tensor
    sharding: NamedSharding = static()
    global_shape: tuple[int, ...] = static()


def _is_leaf(node: Any) -> bool:
    return isinstance(node, Sharded | Whole)


def partition(
    zero: Literal[0, 1, 2, 3],
    *,
    axis: str = "data",
    gather_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    persistence_threshold: int = 0,
    deterministic: bool = False,
    virtual_shards: int | None = None,
) -> Transform:
    r"""Data parallelism over ``axis`` in one of the four ZeRO stages.

    The gradient is that of :math:`\sum_r t_r / \sum_r w_r` over the ranks r (a mean
    over ranks where every rank's loss weighs 1). Bytes sent per rank and step for
    :math:`\Psi` parameters, in units of the dtype on the wire:

    ==== ============================ ===================================== ============
    zero gather                       reduce                                volume
    ==== ============================ ===================================== ============
    0    none (the state is whole)    all-reduce, once                      2 Psi
    1    once per step                reduce-scatter, once                  2 Psi
    2    once per step                reduce-scatter, per microbatch        2 Psi [m=1]
    3    at each use in the loss      its transpose, in the backward        2 Psi [m=1]
    ==== ============================ ===================================== ============

    ``remat`` at stage 3 gathers again in the backward: 3 Psi. Between steps the state
    is the same for stages 1 to 3 (``P(axis)``), so the stage may change at any step.

    Ranks that differ only along other axes of the mesh must be given the same batch.

    Args:
      zero: the stage.
      axis: the mesh axis that splits the batch.
      gather_dtype: what gathers send; default: the storage dtype, or at stage 3 the
        compute dtype of ``precision`` where it is narrower (the same values).
      reduce_dtype: what gradient reductions send; default: the gradient's own dtype
        (the storage dtype; float32 where microbatches were added up before). On gloo
        sums add up in float32 at least; NCCL adds in the dtype that is sent.
      persistence_threshold: at stage 3, leaves of at most this many elements are
        gathered once per step. DeepSpeed's default is 100_000; ours gathers all at use.
      deterministic: the same parameters, bit for bit, on any number of ranks that
        divides ``virtual_shards``: the gradient of each of these parts of the batch is
        computed by itself, and added up along one binary tree. At stages 0 and 1, where
        a rank adds up before it sends. Microbatches are virtual shards then. The number
        of threads per rank must be the same too.
      virtual_shards: a power of two; 8 with ``deterministic``.

    Raises:
      ValueError: a stage that does not exist, a dtype that is not floating, a threshold
        that is not a count or is given to another stage.
      MeshError: (when called) ``axis`` is not an axis of the state's mesh.
      PlacementError: (when called) a state that is not placed, is sharded at stage 0,
        or over an axis that the step does not handle; with ``deterministic``, a number
        of ranks and microbatches that does not divide ``virtual_shards``, or a GPU.

    Every rank must run the same program: a loss that uses other parameters on other
    ranks (a branch on the rank or on the data) mixes up the gathers of stage 3.

    Laws: ``unshard(step(shard(s), b)) == step(s, b)``; stages 1, 2, 3 agree bitwise at
    one microbatch, 2 and 3 at any number, where no leaf is an argument of several
    ``remat`` blocks (stage 3 reduces its gradient once per block); commutes with
    accumulate and precision.

    References:
      Rajbhandari et al., `ZeRO <https://arxiv.org/abs/1910.02054>`_, 2020, sections 5
      and 7.

    Differs from DeepSpeed: the state is sharded between steps at stages 1 and 2 too, so
    that checkpoints do not depend on the stage.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(
      ...     lambda p, b: (p * b).sum(), zf.optim.sgd(0.1), zf.partition(zero=3)
      ... )
      >>> state = zf.shard(torch.ones(3), zf.make_mesh({"data": 1}))
      >>> step(state, torch.ones(3)).params.buffer
      tensor([0.9000, 0.9000, 0.9000])
    """
    _check_options(zero, axis, gather_dtype, reduce_dtype, persistence_threshold)
    shards = _check_fixed_order(zero, reduce_dtype, deterministic, virtual_shards)
    wire_ = Wire(axis, gather_dtype, reduce_dtype)
    stage = _Stage(wire_, zero, persistence_threshold, shards)
    name = f"partition(zero={zero})"

    def transform(step: TrainStep) -> TrainStep:
        if shards:
            _check_order_of(step.tx)
        inner_grad, inner_accumulate = step.grad, step.accumulate
        return step._replace(
            grad=named(lambda loss: stage.grad(inner_grad, loss), name),
            accumulate=named(
                lambda grad_fn: stage.reduce(inner_accumulate(grad_fn)),
                f"{name} . {getattr(inner_accumulate, '__name__', 'accumulate')}",
            ),
        )

    return named(transform, name)


class _Stage:
    """The two places where a stage acts: around autodiff, and around the step."""

    __slots__ = ("threshold", "virtual_shards", "wire", "zero")

    def __init__(
        self, wire_: Wire, zero: int, threshold: int, virtual_shards: int
    ) -> None:
        self.wire, self.zero, self.threshold = wire_, zero, threshold
        self.virtual_shards = virtual_shards

    def grad(self, inner: Callable[[LossFn], GradFn], loss: LossFn) -> GradFn:
        """Per microbatch: gather at use inside autodiff; at stage 2 scatter after."""

        def grad_fn(params: PyTree, batch: PyTree, samples: Samples) -> Any:
            _check_placed(params)
            layout = params

            def on_pieces(buffers: PyTree, batch: PyTree, samples: Samples) -> Tally:
                pieces = _refill(layout, buffers)
                usable = tree_map(
                    lambda x: (
                        gather_on_use(x, self.wire) if is_sharded(x) else x.buffer
                    ),
                    pieces,
                    is_leaf=_is_leaf,
                )
                return loss(usable, batch, samples)

            buffers = tree_map(lambda x: x.buffer, params, is_leaf=_is_leaf)
            tally, grads = inner(on_pieces)(buffers, batch, samples)
            placed = _refill(layout, grads)
            return tally, (self._scatter(placed) if self.zero == 2 else placed)

        return grad_fn

    def reduce(self, grad_fn: GradFn) -> GradFn:
        """Per step: gather before, reduce what is still whole after."""

        def reduced(params: PyTree, batch: PyTree, samples: Samples) -> Any:
            mesh = self._checked_mesh(params)
            offset = collectives.axis_index(self.wire.axis, mesh)
            index = samples.index + offset * samples.index.shape[0]
            here, local = samples._replace(index=index), grad_fn
            if self.virtual_shards:
                n = mesh.axis_size(self.wire.axis)
                local = in_fixed_order(grad_fn, self.virtual_shards, n, mesh)
            tally, grads = local(self._enter(params), batch, here)
            tally = collectives.psum(tally, self.wire.axis, mesh)
            return tally, self._sum_rest(self._scatter(grads))

        return reduced

    def _enter(self, params: PyTree) -> PyTree:
        leaves, spec = tree_flatten(params, _is_leaf)
        here = [i for i, leaf in enumerate(leaves) if self._gathered_first(leaf)]
        picked = [leaves[i] for i in here]
        fulls = gather_buffers(
            picked,
            self.wire.axis,
            wire_dtypes=[self.wire.gather_dtype] * len(picked),
        )
        for i, leaf, full in zip(here, picked, fulls, strict=True):
            leaves[i] = Whole(full, leaf.sharding, leaf.global_shape)
        whole = [
            Whole(x.buffer, x.sharding, x.global_shape)
            if is_sharded(x) and self.wire.axis not in x.sharding.axes
            else x
            for x in leaves
        ]
        return tree_unflatten(spec, whole)

    def _gathered_first(self, leaf: Sharded) -> bool:
        if self.wire.axis not in leaf.sharding.axes:
            return False
        elements = 1
        for d in leaf.global_shape:
            elements *= d
        return self.zero < 3 or elements <= self.threshold

    def _scatter(self, grads: PyTree) -> PyTree:
        """Reduce-scatter the whole gradients of leaves that are sharded."""
        leaves, spec = tree_flatten(grads, _is_leaf)
        here = [
            i
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Whole) and self.wire.axis in leaf.sharding.axes
        ]
        picked = [leaves[i] for i in here]
        pieces = scatter_sum_buffers(
            [leaf.buffer for leaf in picked],
            picked,
            self.wire.axis,
            reduce_dtype=self.wire.reduce_dtype,
        )
        for i, leaf, piece in zip(here, picked, pieces, strict=True):
            leaves[i] = Sharded(piece, leaf.sharding, leaf.global_shape)
        return tree_unflatten(spec, leaves)

    def _sum_rest(self, grads: PyTree) -> PyTree:
        """All-reduce the gradients of replicated leaves."""
        leaves, spec = tree_flatten(grads, _is_leaf)
        here = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Whole)]
        if here:
            mesh = leaves[here[0]].sharding.mesh
            dtypes = tuple(leaves[i].buffer.dtype for i in here)
            op = wire.PSum(mesh, self.wire.axis, self.wire.reduce_dtype, None, dtypes)
            flats = [leaves[i].buffer.reshape(-1) for i in here]
            for i, y in zip(here, collectives.apply(op, flats), strict=True):
                x = leaves[i]
                y = y.reshape(x.buffer.shape)
                leaves[i] = Sharded(y, x.sharding, x.global_shape)
        return tree_unflatten(spec, leaves)

    def _checked_mesh(self, params: PyTree) -> Mesh:
        _check_placed(params, Sharded)
        mesh: Mesh = tree_leaves(params, _is_leaf)[0].sharding.mesh
        for path, leaf in leaves_with_path(params, _is_leaf):
            leaf.sharding.mesh.axis_position(self.wire.axis)
            if leaf.sharding.mesh != mesh:
                raise PlacementError(
                    f"params[{path!r}] lives on the mesh {leaf.sharding.mesh.shape}, "
                    f"others on {mesh.shape}: a step runs on one mesh."
                )
            others = set(leaf.sharding.axes) - {self.wire.axis}
            if others:
                raise PlacementError(
                    f"params[{path!r}] is sharded over {sorted(others)}, which no "
                    f"transformation of this step handles: use {self.wire.axis!r} only."
                )
            if self.zero == 0 and leaf.sharding.axes:
                raise PlacementError(
                    f"params[{path!r}] is sharded over {self.wire.axis!r}, and stage 0 "
                    "keeps the state whole: make it with zf.shard(params, mesh, "
                    "spec=zf.P()), or use zero=1, 2 or 3."
                )
        return mesh


def _check_placed(params: PyTree, kinds: Any = Sharded | Whole) -> None:
    for path, leaf in leaves_with_path(params, _is_leaf):
        if not isinstance(leaf, kinds):
            raise PlacementError(
                f"params[{path!r}] has no placement: make the state with "
                "zf.shard(params, mesh). (A step may have one partition only.)"
            )


def _refill(layout: PyTree, buffers: PyTree) -> PyTree:
    """``layout``'s nodes around other buffers."""

    def one(node: Any, buffer: torch.Tensor) -> Any:
        return type(node)(buffer, node.sharding, node.global_shape)

    return tree_map(one, layout, buffers, is_leaf=_is_leaf)


def _check_options(
    zero: Any, axis: Any, gather: Any, reduce: Any, threshold: Any
) -> None:
    if isinstance(zero, TrainStep):
        raise TypeError("partition makes a transformation: write zf.partition(zero=3)")
    if type(zero) is not int or zero not in (0, 1, 2, 3):
        raise ValueError(f"partition: zero is the stage 0, 1, 2 or 3; got {zero!r}")
    if not isinstance(axis, str) or not axis.isidentifier():
        raise ValueError(f"partition: axis is the name of a mesh axis; got {axis!r}")
    for name, dtype in (("gather_dtype", gather), ("reduce_dtype", reduce)):
        if dtype is None:
            continue
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(
                f"partition: {name} is a floating torch.dtype such as torch.bfloat16; "
                f"got {dtype!r}"
            )
    if gather is not None and zero == 0:
        raise ValueError("partition: stage 0 gathers nothing: leave gather_dtype out")
    if isinstance(threshold, bool) or not isinstance(threshold, int) or threshold < 0:
        raise ValueError(
            f"partition: persistence_threshold counts elements; got {threshold!r}"
        )
    if threshold and zero != 3:
        raise ValueError(
            f"partition: persistence_threshold is for zero=3; stage {zero} gathers "
            "every leaf once per step already"
        )


def _check_fixed_order(
    zero: int, reduce_dtype: Any, deterministic: Any, virtual_shards: Any
) -> int:
    """The number of virtual shards; 0 without ``deterministic``."""
    if not isinstance(deterministic, bool):
        raise TypeError(f"partition: deterministic is a bool; got {deterministic!r}")
    if not deterministic:
        if virtual_shards is not None:
            raise ValueError("partition: virtual_shards is for deterministic=True")
        return 0
    if zero > 1:
        raise ValueError(
            f"partition: deterministic=True adds up a rank's gradients before it sends "
            f"them, which zero={zero} does not: use zero=1, which keeps the same state"
        )
    if reduce_dtype is not None:
        raise ValueError(
            "partition: deterministic=True sends sums as they are: leave reduce_dtype "
            "out, since rounding them depends on how many ranks there are"
        )
    shards = 8 if virtual_shards is None else virtual_shards
    if type(shards) is not int or shards < 1 or shards & (shards - 1):
        raise ValueError(f"partition: virtual_shards is a power of two; got {shards!r}")
    return shards


def _check_order_of(tx: Any) -> None:
    if not (getattr(tx, "leafwise", False) or getattr(tx, "deterministic", False)):
        raise ValueError(
            "partition: deterministic=True needs an optimizer whose bits do not depend "
            "on the mesh, and a part of this one adds up over elements: of a clip type "
            "zf.optim.clip_by_global_norm(c, deterministic=True); others, such as "
            "lamb, muon and adafactor, have no such form yet: leave deterministic out"
        )
