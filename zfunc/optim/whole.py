# SPDX-License-Identifier: Apache-2.0
"""Leaves as wholes, which ranks hold in pieces: their shapes, and sums over them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zfunc.core import collectives
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import P, Sharded, is_sharded
from zfunc.core.tree import PyTree, tree_flatten, tree_structure, tree_unflatten
from zfunc.optim.base import LEAF, widen


class Part(NamedTuple):
    """This rank's part of a sum over some dims of a leaf; all dims if None.

    Examples:
      >>> Part(torch.ones(()), torch.ones(3)).dims is None
      True
    """

    value: Tensor
    leaf: Any
    dims: tuple[int, ...] | None = None

    def axes(self) -> tuple[tuple[Mesh, str], ...]:
        """The axes of more than one rank that the sum goes over, with their mesh."""
        entries = spec_of(self.leaf)
        wanted = range(len(entries)) if self.dims is None else self.dims
        named = [axis for axis in (entries[dim] for dim in wanted) if axis is not None]
        return tuple(
            (self.leaf.sharding.mesh, axis)
            for axis in named
            if self.leaf.sharding.mesh.axis_size(axis) > 1
        )


def sum_over_ranks(parts: Sequence[Part]) -> list[Tensor]:
    r"""The sums :math:`\sum_r x_r` that the parts make up: one message per mesh axis.

    Args:
      parts: Floating tensors, each with the leaf whose placement says which ranks
        have the others. What ranks have in common is not added up.

    Returns:
      The sums in the order, shapes and dtypes of the parts. On every rank that
      shares one, the same bits.

    Examples:
      >>> sum_over_ranks([Part(torch.tensor(2.0), torch.ones(2))])
      [tensor(2.)]
    """
    values = [part.value for part in parts]
    axes = [part.axes() for part in parts]
    for mesh, axis in dict.fromkeys(pair for some in axes for pair in some):
        where = [i for i, some in enumerate(axes) if (mesh, axis) in some]
        flat = torch.cat([values[i].reshape(-1) for i in where])
        pieces = collectives.psum(flat, axis, mesh).split(
            [values[i].numel() for i in where]
        )
        for i, piece in zip(where, pieces, strict=True):
            values[i] = piece.view(values[i].shape).to(values[i].dtype)
    return values


def square_sum(leaf: Any) -> Part:
    """This rank's part of a leaf's sum of squares, in ``widen``'s dtype.

    Args:
      leaf: A floating tensor or a ``Sharded`` node; its padding is zero.

    Returns:
      The part, for ``sum_over_ranks``.

    Examples:
      >>> square_sum(torch.tensor([3.0, 4.0])).value
      tensor(25.)
    """
    return Part(widen(buffer_of(leaf)).square().sum(), leaf)


def buffer_of(leaf: Any) -> Tensor:
    """This rank's tensor of a leaf.

    Args:
      leaf: A tensor or a ``Sharded`` node.

    Returns:
      The tensor.

    Examples:
      >>> buffer_of(torch.ones(1))
      tensor([1.])
    """
    return leaf.buffer if is_sharded(leaf) else leaf  # type: ignore[no-any-return]


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of a leaf over all ranks.

    Args:
      leaf: A tensor or a ``Sharded`` node.

    Returns:
      The global shape: padding is no part of it.

    Examples:
      >>> shape_of(torch.ones(2, 3))
      (2, 3)
    """
    return leaf.global_shape if is_sharded(leaf) else tuple(leaf.shape)


def placed_leaves(tree: PyTree) -> list[Any]:
    """The leaves of a tree, ``Sharded`` nodes whole.

    Args:
      tree: Parameters, or what is placed like them.

    Returns:
      The leaves in the order of ``tree_leaves``.

    Examples:
      >>> placed_leaves({"w": torch.ones(1)})
      [tensor([1.])]
    """
    return tree_flatten(tree, is_sharded)[0]


def with_buffer(leaf: Any, buffer: Any) -> Any:
    """A leaf of the same placement with another tensor in it.

    Args:
      leaf: A tensor or a ``Sharded`` node.
      buffer: What this rank holds instead.

    Returns:
      A tensor or a ``Sharded`` node, as ``leaf`` is.

    Examples:
      >>> with_buffer(torch.ones(1), torch.zeros(1))
      tensor([0.])
    """
    return dataclasses.replace(leaf, buffer=buffer) if is_sharded(leaf) else buffer


def outline_beside(leaf: Any, spec: P, global_shape: tuple[int, ...]) -> Any:
    """The structure of ``zeros_beside``, without the zeros.

    Args:
      leaf: A tensor or a ``Sharded`` node.
      spec: Where they live; of no effect beside a plain tensor.
      global_shape: Their shape over all ranks.

    Returns:
      A leaf without meaning, or a ``Sharded`` node with one.

    Examples:
      >>> outline_beside(torch.ones(2), P(), (3,)) is LEAF
      True
    """
    if not is_sharded(leaf):
        return LEAF
    return Sharded(
        LEAF, dataclasses.replace(leaf.sharding, spec=spec), tuple(global_shape)
    )


def zeros_beside(leaf: Any, spec: P, global_shape: tuple[int, ...]) -> Any:
    """Zeros of another shape on the mesh of a leaf, in ``widen``'s dtype.

    Args:
      leaf: A tensor or a ``Sharded`` node.
      spec: Where the zeros live; of no effect beside a plain tensor.
      global_shape: Their shape over all ranks.

    Returns:
      A tensor or a ``Sharded`` node, as ``leaf`` is.

    Examples:
      >>> zeros_beside(torch.ones(2, dtype=torch.bfloat16), P(), (3,))
      tensor([0., 0., 0.])
    """
    buffer, made = buffer_of(leaf), outline_beside(leaf, spec, global_shape)
    local = (
        made.sharding.local_shape(global_shape) if is_sharded(made) else global_shape
    )
    wide = torch.promote_types(buffer.dtype, torch.float32)
    return with_buffer(made, buffer.new_zeros(local, dtype=wide))


def spec_of(leaf: Any) -> tuple[str | None, ...]:
    """The axis that shards each dim of a leaf, or None.

    Args:
      leaf: A tensor or a ``Sharded`` node.

    Returns:
      One entry per dim.

    Examples:
      >>> spec_of(torch.ones(2, 3))
      (None, None)
    """
    spec = leaf.sharding.spec if is_sharded(leaf) else ()
    return (*spec, *[None] * (len(shape_of(leaf)) - len(spec)))


def only(tree: PyTree, picks: Sequence[bool]) -> PyTree:
    """The tree with None, which is no leaf, in the place of every other leaf.

    Args:
      tree: Parameters, or what is placed like them.
      picks: For each of ``placed_leaves(tree)`` whether it stays.

    Returns:
      A tree of the same containers.

    Examples:
      >>> only({"a": 1, "b": 2}, [False, True])
      {'a': None, 'b': 2}
    """
    leaves = placed_leaves(tree)
    chosen = [x if pick else None for x, pick in zip(leaves, picks, strict=True)]
    return tree_unflatten(tree_structure(tree, is_sharded), chosen)


def merged(
    like: PyTree, picks: Sequence[bool], picked: Sequence[Any], others: Sequence[Any]
) -> PyTree:
    """The tree whose leaves were taken apart by ``only``.

    Args:
      like: A tree of its structure.
      picks: For each leaf whether it is one of ``picked``.
      picked: The leaves that were picked.
      others: The rest.

    Returns:
      A tree like ``like``.

    Examples:
      >>> merged({"a": 0, "b": 0}, [False, True], [2], [1])
      {'a': 1, 'b': 2}
    """
    some, rest = iter(picked), iter(others)
    leaves = [next(some if pick else rest) for pick in picks]
    return tree_unflatten(tree_structure(like, is_sharded), leaves)
