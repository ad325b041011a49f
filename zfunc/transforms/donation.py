# SPDX-License-Identifier: Apache-2.0
"""``donate``: a step that lets go of its input as it goes; purity stays."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from zfunc.core.errors import PlacementError
from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.state import Donated, TrainState, check_usable
from zfunc.core.step import TrainStep
from zfunc.core.tree import PyTree, leaves_with_path, tree_leaves, tree_map
from zfunc.core.update import consuming_update


def donate(step: TrainStep) -> Callable[[TrainState, PyTree], TrainState]:
    """The same step, bit for bit, which consumes its input's buffers.

    The gradients of the last step are freed before the backward, parameters and moments
    as their successors are made: a group of leaves at a time where the optimizer is
    leafwise. Nothing is written over, so tensors that share memory with the old state
    keep their values. A step that raises before its update leaves the old state usable,
    with gradients of zero. Every leaf of the old state's params,
    grads and moments then raises ``DonatedBufferError`` on use; step, key and metrics
    stay readable.

    Laws: ``donate(step) == step`` bitwise.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> from zfunc.core.step import _example_tx, train_step
      >>> step = donate(train_step(lambda p, b: (p * b).sum(), _example_tx()))
      >>> old = shard(torch.ones(2), make_mesh({}))
      >>> step(old, torch.ones(2)).params.buffer
      tensor([0.9000, 0.9000])
      >>> old.params.buffer + 1
      Traceback (most recent call last):
      zfunc.core.errors.DonatedBufferError: state.params[''] was donated to a step ...
    """
    if not isinstance(step, TrainStep):
        raise TypeError(f"donate takes a TrainStep, got a {type(step).__name__}")

    @functools.wraps(step.__call__)
    def donating(state: TrainState, batch: PyTree) -> TrainState:
        check_placed(check_usable(state))
        moments = step.moments_of(state)
        _consume(grads=state.grads)
        try:  # what is wrong with a batch shows here, with all that is needed in place
            metrics, grads, finite = step.gradients(state, batch)
        except BaseException:
            _give_back(state.grads, like=state.params)
            raise
        owned = _consume(params=state.params, moments=moments)
        del moments
        params, moments = consuming_update(step.tx, grads, owned, finite)
        return step.advanced(state, params, grads, moments, metrics)

    return donating


def check_placed(state: TrainState) -> None:
    """Raise where a leaf of the parameters is no ``Sharded``: only those are taken.

    Raises:
      PlacementError: with the path of the first plain tensor.

    Example:
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> check_placed(shard(torch.ones(2), make_mesh({})))
    """
    for path, leaf in leaves_with_path(state.params, is_sharded):
        if not is_sharded(leaf):
            raise PlacementError(
                f"params[{path!r}] is a plain tensor, which a step cannot take over: "
                "make the state with zf.shard(params, mesh), or do not donate."
            )


def _consume(**trees: PyTree) -> list[PyTree]:
    """Take over the buffers of placed leaves: those of ``trees`` refuse all use."""
    taken = [tree_map(lambda leaf: leaf, tree) for tree in trees.values()]
    for name, tree in trees.items():
        for path, leaf in leaves_with_path(tree, is_sharded):
            if isinstance(leaf, Sharded):
                object.__setattr__(leaf, "buffer", Donated(f"state.{name}[{path!r}]"))
    return taken


def _give_back(tree: PyTree, *, like: PyTree) -> None:
    """Make consumed leaves usable again, as zeros placed like ``like``."""
    if tree is None:
        return
    pairs = zip(
        tree_leaves(tree, is_sharded), tree_leaves(like, is_sharded), strict=True
    )
    for leaf, other in pairs:
        if isinstance(leaf, Sharded):
            object.__setattr__(leaf, "buffer", torch.zeros_like(other.buffer))
