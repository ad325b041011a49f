# SPDX-License-Identifier: Apache-2.0
"""A training step as four pure functions, which transformations replace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from zfunc.core.autodiff import value_and_grad
from zfunc.core.errors import LossError, PlacementError
from zfunc.core.random import fold_in
from zfunc.core.sharding import Sharded, global_norm, is_sharded
from zfunc.core.state import Mean, Metrics, TrainState, check_usable
from zfunc.core.tally import LossFn, Samples, Tally, tallying
from zfunc.core.tree import (
    PyTree,
    check_structure,
    leaves_with_path,
    map_with_path,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)
from zfunc.core.update import pure_update, widen

GradFn = Callable[[PyTree, PyTree, Samples], tuple[Tally, PyTree]]


def local_grad(loss: LossFn) -> GradFn:
    """The slot ``grad`` of a step of one rank: autodiff and nothing else."""

    def grad_fn(
        params: PyTree, batch: PyTree, samples: Samples
    ) -> tuple[Tally, PyTree]:
        plain = map_with_path(_only_rank, params, is_leaf=is_sharded)

        def total(p: PyTree) -> tuple[torch.Tensor, Tally]:
            tally = loss(p, batch, samples)
            total, scale = tally.loss.total, samples.loss_scale
            return total if scale is None else total * scale.to(total.dtype), tally

        before = _versions(plain)
        (_, tally), grads = value_and_grad(total, has_aux=True)(plain)
        for (path, old), (_, new) in zip(before, _versions(plain), strict=True):
            if old != new:
                raise LossError(
                    f"the loss wrote to params[{path!r}] in place and so changed the "
                    "state: load a checkpoint, and compute a new tensor instead."
                )
        return tally, placed_like(params, grads)

    return grad_fn


def _versions(tree: PyTree) -> list[tuple[str, int]]:
    """How often each leaf was written to; tensors of a simulation do not say."""
    return [
        (path, x._version)
        for path, x in leaves_with_path(tree)
        if not (torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_inference())
    ]


def _only_rank(path: str, leaf: Any) -> Any:
    if is_sharded(leaf) and leaf.sharding.mesh.size > 1:
        mesh = leaf.sharding.mesh
        raise PlacementError(
            f"params[{path!r}] lives on the mesh {mesh.shape} but no transformation of "
            f"this step uses it: add zf.partition(zero=..., axis="
            f"{next(iter(mesh.shape))!r}) to zf.train_step."
        )
    return leaf.buffer if is_sharded(leaf) else leaf


def placed_like(like: PyTree, plain: PyTree) -> PyTree:
    """``plain`` with each tensor placed as the leaf of ``like`` in its position."""

    def one(leaf: Any, x: torch.Tensor) -> Any:
        return Sharded(x, leaf.sharding, leaf.global_shape) if is_sharded(leaf) else x

    return tree_map(one, like, plain, is_leaf=is_sharded)


def keep(grad_fn: GradFn) -> GradFn:
    """The slot ``accumulate`` of a step of one microbatch: nothing to add up."""
    return grad_fn


class TrainStep(NamedTuple):
    """``(state, batch) -> state`` as four pure functions; made by ``train_step``.

    ``loss`` runs inside autodiff; ``grad`` is around it, once per microbatch;
    ``accumulate`` is around that, once per step; ``tx`` comes after the gradient. A
    transformation replaces a slot, so those of different slots commute. ``scaling``,
    where there is one, is the rule of the loss scale: a step whose gradients are not
    finite leaves parameters and moments as they were.

    Example:
      >>> train_step(lambda p, b: (p * b).sum(), _example_tx()).accumulate is keep
      True
    """

    loss: LossFn
    tx: Any
    grad: Callable[[LossFn], GradFn] = local_grad
    accumulate: Callable[[GradFn], GradFn] = keep
    scaling: Any = None

    def __call__(self, state: TrainState, batch: PyTree) -> TrainState:
        """One step: the gradient of the mean loss, the update, the metrics."""
        moments = self.moments_of(check_usable(state))
        metrics, grads, finite = self.gradients(state, batch)
        params, moments = pure_update(self.tx, grads, moments, state.params, finite)
        return self.advanced(state, params, grads, moments, metrics)

    def gradients(
        self, state: TrainState, batch: PyTree
    ) -> tuple[Metrics, PyTree, torch.Tensor | None]:
        """The metrics and the reduced gradient of the mean loss, before the update.

        Last, with a loss scale, whether the gradient is finite: the same on all ranks.
        """
        scaled, key = self.loss_scale_of(state), fold_in(state.key, state.step)
        scale = None if scaled is None else scaled.scale
        samples = Samples(key, _sample_index(batch, state), scale)
        grad_fn = self.accumulate(self.grad(self.loss))
        tally, summed = grad_fn(state.params, batch, samples)
        weight = tally.loss.weight
        divisor = torch.where(weight == 0, torch.ones_like(weight), weight)
        if scale is not None:
            divisor = divisor * scale.to(divisor.dtype)
        leaves, spec = tree_flatten(summed)
        del summed
        for i, g in enumerate(leaves):  # one at a time: each frees the one it replaces
            leaves[i] = (
                (g / divisor).to(g.dtype) if scale is None else widen(g) / divisor
            )
            del g
        grads = tree_unflatten(spec, leaves)
        values = tree_map(Mean.value, tally, is_leaf=lambda x: isinstance(x, Mean))
        norm = global_norm(grads)
        finite = None if scale is None else norm.isfinite()
        skipped = torch.zeros_like(state.step) if finite is None else (~finite).long()
        return Metrics(values.loss, norm, skipped, values.aux), grads, finite

    def loss_scale_of(self, state: TrainState) -> Any:
        """The state's loss scale; at the first step, a new one; None without a rule."""
        rule, scale = self.scaling, state.loss_scale
        if rule is None:
            return None
        return rule.init(state.step) if scale is None else rule.entered(scale)

    def advanced(
        self,
        state: TrainState,
        params: PyTree,
        grads: PyTree,
        moments: PyTree,
        metrics: Metrics,
    ) -> TrainState:
        """The next state; its gradients are stored in the dtype of the parameters."""
        stored = tree_map(lambda g, p: g.to(p.dtype), grads, params)
        scale = self.loss_scale_of(state)
        if scale is not None:
            scale = self.scaling.adjusted(scale, metrics.skipped == 0)
        count = state.step + 1
        return TrainState(count, params, stored, moments, scale, state.key, metrics)

    def moments_of(self, state: TrainState) -> PyTree:
        """The state's moments, fitting this optimizer; at the first step, new ones."""
        if state.moments is None:
            return self.tx.init(state.params)
        self._check_moments(state.params, state.moments)
        return state.moments

    def _check_moments(self, params: PyTree, moments: PyTree) -> None:
        specs = tree_structure(params), tree_structure(moments)
        expected = _mismatch(self.tx, *specs)
        if expected is not None:
            check_structure(
                expected,
                moments,
                "state.moments",
                "They belong to another optimizer or other parameters: make the state "
                "with zf.shard(params, mesh, tx=tx), or start this optimizer afresh "
                "with state.replace(moments=None).",
            )

    def __repr__(self) -> str:
        slots = (self.loss, self.grad, self.accumulate)
        names = " ".join(
            f"{slot}={getattr(fn, '__name__', fn)}"
            for slot, fn in zip(("loss", "grad", "accumulate"), slots, strict=True)
        )
        return f"<TrainStep {names}>"


@functools.lru_cache(maxsize=64)
def _mismatch(tx: Any, params_spec: Any, moments_spec: Any) -> PyTree | None:
    """The moments that ``tx`` makes, where their structure is another; asked once."""
    leaves = [torch.empty((), device="meta")] * params_spec.num_leaves
    expected = tx.init(tree_unflatten(params_spec, leaves))
    return expected if tree_structure(expected) != moments_spec else None


Transform = Callable[[TrainStep], TrainStep]


def train_step(
    loss_fn: Callable[..., Any], tx: Any, *transforms: Transform
) -> TrainStep:
    r"""The pure step :math:`(s, b) \mapsto s'` of a loss, an optimizer and the rest.

    Args:
      loss_fn: ``(params, batch)`` or ``(params, batch, key)`` to a floating scalar, to
        ``(scalar, aux)``, or to a ``Mean`` in the scalar's place. ``batch`` is this
        rank's slice along the data axis. ``key`` (or ``keys``, or a required third
        parameter) receives one key per sample (int64 [B]), the same whatever the mesh
        and the microbatches, where all ranks have equally many samples.
        ``aux`` is a pytree of scalars or ``Mean``; it comes out, averaged, as
        ``state.metrics.aux``.
      tx: a ``GradientTransformation``, from ``zfunc.optim``.
      *transforms: ``partition``, ``precision``, ``accumulate``, in any order.

    Laws: the step is a pure function (nothing it is given changes); sharded equals
    unsharded; transformations of different slots commute bitwise.

    Differs from DeepSpeed: no engine, no ``backward`` and ``step`` calls to order.

    Raises:
      TypeError: something that is not a loss, an optimizer or a transformation.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> step = train_step(lambda p, batch: ((p - batch) ** 2).mean(), _example_tx())
      >>> state = step(shard(torch.zeros(2), make_mesh({})), torch.ones(2))
      >>> state.metrics.loss, state.params.buffer
      (tensor(1.), tensor([0.1000, 0.1000]))
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got a {type(loss_fn).__name__}")
    if not (
        callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))
    ):
        raise TypeError(
            f"tx must be a GradientTransformation such as zf.optim.adamw(3e-4), got "
            f"{tx!r}. (Transformations such as partition come after it.)"
        )
    step = TrainStep(tallying(loss_fn), tx)
    for transform in transforms:
        made = transform(step) if callable(transform) else None
        if not isinstance(made, TrainStep):
            raise TypeError(
                f"{transform!r} is not a transformation of a TrainStep: call its "
                "maker, as in zf.partition(zero=3)."
            )
        step = made
    return step


def _sample_index(batch: PyTree, state: TrainState) -> torch.Tensor:
    tensors = [x for x in tree_leaves(batch) if isinstance(x, torch.Tensor) and x.dim()]
    count = next((len(x) for x in tensors if len(x)), 0)
    return torch.arange(count, device=state.key.device)


def _example_tx() -> Any:
    """Gradient descent with rate 0.1, for the examples of this layer."""

    class Descent(NamedTuple):
        init: Any
        update: Any

    return Descent(
        lambda params: (), lambda g, m, p: (tree_map(lambda x: -0.1 * x, g), m)
    )
