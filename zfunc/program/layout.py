# SPDX-License-Identifier: Apache-2.0
"""``Layout``: what a program takes and returns, ready to be compared and filled.

A state of a 12-layer model has about 450 leaves and a step of a small one takes a few
milliseconds, so a call compares lists (whose equality is identity first) and lets
optree walk the containers only: a ``Sharded`` node is a leaf here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from operator import attrgetter
from typing import Any, Final, NamedTuple

import torch

from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.state import TrainState
from zfunc.core.tree import PyTree, tree_flatten, tree_unflatten

# ``is_sharded`` without a Python frame for every container and leaf.
_IS_SHARDED: Final = type.__instancecheck__.__get__(Sharded)
_PLACEMENT: Final = attrgetter("sharding", "global_shape")
_SHAPE: Final = attrgetter("shape")
_DTYPE: Final = attrgetter("dtype")
_DEVICE: Final = attrgetter("device")


class Matched(NamedTuple):
    """The arguments of a call: the nodes of the tree, and the tensors in them."""

    nodes: list[Any]
    tensors: list[torch.Tensor]


class Shown(NamedTuple):
    """What of the leaves decides which program fits; one list per property."""

    placed: list[bool]
    placements: list[Any]
    shapes: list[Any]
    dtypes: list[Any]
    strides: list[Any]
    devices: list[Any]
    others: list[Any]


@dataclass(frozen=True, eq=False)
class Layout:
    """The arguments that a program was traced for, and the state that it returns."""

    spec: Any
    shown: Shown
    out_spec: Any
    out_placed: tuple[tuple[int, Any, Any], ...]

    def match(self, state: TrainState, batch: PyTree) -> Matched | None:
        """The nodes and tensors of arguments that the program fits, else None.

        Raises:
          DonatedBufferError: a leaf was donated.
        """
        nodes, spec = _flat(state, batch)
        if spec != self.spec:
            return None
        shown, tensors = _shown(nodes)
        return Matched(nodes, tensors) if shown == self.shown else None

    def filled(self, outputs: list[Any]) -> PyTree:
        """The state that the program's outputs, a list that is used up, make."""
        for i, sharding, global_shape in self.out_placed:
            # Sharded(...) of a frozen dataclass takes three times as long.
            node = object.__new__(Sharded)
            fields = node.__dict__
            fields["buffer"] = outputs[i]
            fields["sharding"] = sharding
            fields["global_shape"] = global_shape
            outputs[i] = node
        return tree_unflatten(self.out_spec, outputs)


def layout_of(state: TrainState, batch: PyTree, out_spec: Any) -> Layout:
    """The layout of these arguments and of results of structure ``out_spec``."""
    nodes, spec = _flat(state, batch)
    result = tree_unflatten(out_spec, [0] * out_spec.num_leaves)
    out_nodes, outline = tree_flatten(result, is_sharded)
    placed = [
        (i, node.sharding, node.global_shape)
        for i, node in enumerate(out_nodes)
        if is_sharded(node)
    ]
    return Layout(spec, _shown(nodes)[0], outline, tuple(placed))


def _flat(state: TrainState, batch: PyTree) -> tuple[list[Any], Any]:
    """What a step reads of its arguments, in the order of a program's inputs."""
    metrics = state.metrics
    read = (state.step, state.params, state.moments, state.loss_scale, state.key)
    measured = (metrics.loss, metrics.grad_norm, metrics.skipped)
    return tree_flatten((*read, *measured, batch), _IS_SHARDED)


def _shown(nodes: list[Any]) -> tuple[Shown, list[torch.Tensor]]:
    placed = [type(node) is Sharded for node in nodes]
    leaves = [
        node.buffer if yes else node for node, yes in zip(nodes, placed, strict=True)
    ]
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    others = []
    if len(tensors) < len(leaves):
        others = [
            (i, type(x), x)
            for i, x in enumerate(leaves)
            if not isinstance(x, torch.Tensor)
        ]
    shown = Shown(  # maps, which cost less than comprehensions
        placed,
        list(map(_PLACEMENT, compress(nodes, placed))),
        list(map(_SHAPE, tensors)),
        list(map(_DTYPE, tensors)),
        list(map(torch.Tensor.stride, tensors)),
        list(map(_DEVICE, tensors)),
        others,
    )
    return shown, tensors
