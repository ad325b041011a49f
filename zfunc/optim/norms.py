# SPDX-License-Identifier: Apache-2.0
"""A norm whose bits do not depend on the mesh."""

from typing import Any

import torch
from torch import Tensor

from zfunc.core import collectives
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import is_sharded
from zfunc.core.tree import PyTree, tree_leaves
from zfunc.core.update import widen


def tree_ordered_norm(tree: PyTree) -> Tensor:
    r"""The Euclidean norm of all elements over all ranks, added up in a fixed order.

    Squares are added up along a binary tree over each row (a slice of the dim that is
    sharded, else of dim 0), then over the rows of a leaf, gathered on every rank, then
    leaf by leaf: only elementwise additions, each of which has one result.

    Args:
      tree: Tensors; placed leaves are sharded along one dim at most.

    Returns:
      0-d, float32 at least, the same bits for every number of ranks.

    Examples:
      >>> tree_ordered_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
      tensor(5.)

    Differs from:
      ``global_norm`` adds up each rank's piece with ``sum()``, which is faster, and
      whose order depends on the piece.
    """
    rows: list[Tensor] = []
    shared: dict[tuple[Mesh, str], list[int]] = {}
    heights: list[int | None] = []
    for i, leaf in enumerate(tree_leaves(tree, is_sharded)):
        buffer, dim, height = _rows_of(leaf)
        square = widen(buffer).square()
        square = square.movedim(dim, 0) if square.dim() else square.reshape(1)
        rows.append(_halved(square.reshape(*_flat(square)).t()))
        heights.append(height)
        if is_sharded(leaf) and leaf.sharding.axes:
            (axis,) = leaf.sharding.axes
            shared.setdefault((leaf.sharding.mesh, axis), []).append(i)
    for (mesh, axis), where in shared.items():
        gathered = collectives.all_gather([rows[i] for i in where], axis, mesh)
        for i, row in zip(where, gathered, strict=True):
            rows[i] = row[: heights[i]]
    if not rows:
        return torch.zeros(())
    total = _halved(rows[0])
    for row in rows[1:]:
        total = total + _halved(row)
    return total.sqrt()


def _rows_of(leaf: Any) -> tuple[Tensor, int, int | None]:
    """This rank's piece, the dim that rows are slices of, and their number in all."""
    if not is_sharded(leaf):
        return leaf, 0, None
    dims = [d for d, entry in enumerate(leaf.sharding.spec) if entry is not None]
    dim = dims[0] if dims else 0
    return leaf.buffer, dim, leaf.global_shape[dim] if dims else None


def _flat(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1:].numel()


def _halved(x: Tensor) -> Tensor:
    """The sum over dim 0, along a binary tree: zeros fill it up to a power of two."""
    size = x.shape[0]
    if size == 0:
        return x.new_zeros(x.shape[1:])
    full = 1 << (size - 1).bit_length()
    if full > size:
        x = torch.cat([x, x.new_zeros(full - size, *x.shape[1:])])
    while x.shape[0] > 1:
        half = x.shape[0] // 2
        x = x[:half] + x[half:]
    return x[0]
