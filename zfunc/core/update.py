# SPDX-License-Identifier: Apache-2.0
"""The optimizer's part of a step: pure, or consuming what it was given."""

from __future__ import annotations

from typing import Any

import torch

from zfunc.core.sharding import is_sharded
from zfunc.core.tree import (
    PyTree,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)

NUM_GROUPS = 16  # new moments and updates exist for one group of leaves at a time


def pure_update(
    tx: Any, grads: PyTree, moments: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """``(params + updates, new moments)``; nothing that is given changes."""
    updates, moments = tx.update(grads, moments, params)
    return tree_map(_added, params, updates), moments


def consuming_update(
    tx: Any, grads: PyTree, moments: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    r"""The same bits; parameters and moments are written over.

    A ``leafwise`` transformation updates a group of leaves at a time and its new
    moments replace the old ones, so that :math:`16\Psi/n` bytes of state stay that.
    """
    if not getattr(tx, "leafwise", False):
        updates, new_moments = tx.update(grads, moments, params)
        return tree_map(_add_in_place, params, updates), new_moments
    spec, (leaves, outline) = tree_structure(params), tree_flatten(params, is_sharded)
    grad_leaves = tree_flatten(grads, is_sharded)[0]
    columns, rebuild = _mirrors(moments, spec)
    for group in _groups(leaves):
        some_params = _only(outline, leaves, group)
        some_moments = rebuild([_only(outline, column, group) for column in columns])
        some_grads = _only(outline, grad_leaves, group)
        updates, new_moments = tx.update(some_grads, some_moments, some_params)
        tree_map(_add_in_place, some_params, updates)
        new_columns, finish = _mirrors(new_moments, tree_structure(some_params))
        for column, new in zip(columns, new_columns, strict=True):
            old = [column[i] for i in group]
            tree_map(lambda x, y: x.copy_(y), old, new)
    # Counts and other small things are whatever the last group made of them.
    return params, finish([tree_unflatten(outline, column) for column in columns])


def _added(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``p + u`` in the wider dtype, rounded once."""
    return (p + u).to(p.dtype)


def _add_in_place(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    if torch.promote_types(p.dtype, u.dtype) == p.dtype:
        return p.add_(u)
    return p.copy_(p + u)


def _groups(leaves: list[Any]) -> list[list[int]]:
    """Runs of leaves, each of about 1/NUM_GROUPS of all bytes or one leaf."""
    sizes_bytes = [sum(x.nbytes for x in tree_leaves(leaf)) for leaf in leaves]
    limit_bytes = sum(sizes_bytes) / NUM_GROUPS
    groups: list[list[int]] = []
    filled_bytes = limit_bytes + 1
    for i, size_bytes in enumerate(sizes_bytes):
        if filled_bytes + size_bytes > limit_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(i)
        filled_bytes += size_bytes
    return groups


def _only(outline: Any, leaves: list[Any], group: list[int]) -> PyTree:
    """The tree with None, which is no leaf, in the place of every other leaf."""
    chosen = [leaf if i in group else None for i, leaf in enumerate(leaves)]
    return tree_unflatten(outline, chosen)


def _mirrors(moments: PyTree, spec: Any) -> tuple[list[list[Any]], Any]:
    """The leaves of each subtree that has the parameters' structure, and back."""

    def is_mirror(node: Any) -> bool:
        return bool(tree_structure(node) == spec)

    parts, outer = tree_flatten(moments, is_mirror)
    where = [i for i, part in enumerate(parts) if is_mirror(part)]
    columns = [tree_flatten(parts[i], is_sharded)[0] for i in where]

    def rebuild(subtrees: list[PyTree]) -> PyTree:
        filled = list(parts)
        for i, subtree in zip(where, subtrees, strict=True):
            filled[i] = subtree
        return tree_unflatten(outer, filled)

    return columns, rebuild
