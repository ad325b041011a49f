# SPDX-License-Identifier: Apache-2.0
"""Parameters that live in pieces, gathered layer by layer as a forward uses them.

ZeRO-Inference: no rank ever holds the whole model. The first use of a parameter gathers
it, and the first use of another layer lets go of it, so the peak is one layer rather
than one model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from zfunc.core import collectives
from zfunc.core.errors import PlacementError
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.tree import PyTree, leaves_with_path, map_with_path, tree_leaves
from zfunc.transforms.gathered import GatherOnUse, Group, Wire


class Piece(Group):
    """A parameter that stays gathered until one of another layer is used."""

    __slots__ = ("gathered", "layer")

    def __init__(
        self, leaf: Sharded, axis: str, layer: str, gathered: dict[str, list[Piece]]
    ) -> None:
        super().__init__([leaf], [leaf.buffer.dtype], Wire(axis))
        # What is gathered, of one layer; all pieces share it.
        self.layer, self.gathered = layer, gathered

    def full(self, index: int) -> torch.Tensor:
        """The gathered tensor."""
        if self.layer not in self.gathered:
            for other in itertools.chain(*self.gathered.values()):
                other.memo.clear()
            self.gathered.clear()
        if True not in self.memo:
            self.memo[True] = self._gather()
            self.gathered.setdefault(self.layer, []).append(self)
        return self.memo[True][index]


def streamed(params: PyTree) -> PyTree:
    """Placed leaves as tensors that are gathered when used; others as they are.

    A layer is what is under the first number of a path (``layers/3``,
    ``model.layers.3``); a leaf without a number is one by itself.

    Args:
      params: Tensors, and ``Sharded`` leaves over at most one axis each.

    Examples:
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.sharding import NamedSharding, P, place
      >>> leaf = place(torch.ones(3), NamedSharding(make_mesh({"data": 1}), P("data")))
      >>> streamed({"w": leaf})["w"] * 2
      tensor([2., 2., 2.])
    """
    gathered: dict[str, list[Piece]] = {}

    def one(path: str, leaf: Any) -> Any:
        if not is_sharded(leaf):
            return leaf
        if not leaf.sharding.axes:
            return leaf.buffer
        (axis,) = leaf.sharding.axes
        return GatherOnUse(Piece(leaf, axis, layer_of(path), gathered), 0)

    return map_with_path(one, params, is_leaf=is_sharded)


def layer_of(path: str) -> str:
    """The part of a parameter's path up to its first number.

    Examples:
      >>> layer_of("model.layers.12.mlp.up.weight"), layer_of("layers/0/attn/q")
      ('model.layers.12', 'layers.0')
      >>> layer_of("embedding")
      'embedding'
    """
    words = path.replace("/", ".").split(".")
    numbers = [i for i, word in enumerate(words) if word.isdecimal()]
    return ".".join(words[: numbers[0] + 1] if numbers else words)


def check_streamable(params: PyTree) -> None:
    """Raise for placements that ``streamed`` does not read.

    Args:
      params: As ``streamed`` takes them.

    Raises:
      PlacementError: A leaf is sharded over two axes.

    Examples:
      >>> check_streamable({"w": torch.ones(2)})
    """
    for path, leaf in leaves_with_path(params, is_sharded):
        if is_sharded(leaf) and len(leaf.sharding.axes) > 1:
            raise PlacementError(
                f"generate: params[{path!r}] is sharded over the axes "
                f"{', '.join(leaf.sharding.axes)}, expected one at most: reshard it "
                'over one, such as P("data").'
            )


def talking(params: PyTree) -> list[tuple[Mesh, str]]:
    """The mesh axes whose ranks gather from each other, in the same order everywhere.

    Args:
      params: As ``streamed`` takes them.

    Examples:
      >>> talking({"w": torch.ones(2)})
      []
    """
    found: dict[tuple[Mesh, str], None] = {}
    for leaf in tree_leaves(params, is_sharded):
        if is_sharded(leaf):
            for axis in leaf.sharding.axes:
                if leaf.sharding.mesh.axis_size(axis) > 1:
                    found[leaf.sharding.mesh, axis] = None
    return list(found)


def sum_over(value: torch.Tensor, axes: Iterable[tuple[Mesh, str]]) -> torch.Tensor:
    """The sum of a tensor over the ranks that gather from each other.

    Args:
      value: Of the same shape on every rank.
      axes: As ``talking`` gives them.

    Examples:
      >>> sum_over(torch.ones(()), [])
      tensor(1.)
    """
    for mesh, axis in axes:
        value = collectives.psum(value, axis, mesh)
    return value
