# SPDX-License-Identifier: Apache-2.0
"""The optimizer's part of a step: keeping what it is given, or letting it go."""

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
    tx: Any,
    grads: PyTree,
    moments: PyTree,
    params: PyTree,
    finite: torch.Tensor | None = None,
) -> tuple[PyTree, PyTree]:
    """``(params + updates, new moments)``; nothing that is given changes.

    In one pass, with the same bits, where ``tx`` has a kernel for such parameters.
    Where ``finite`` is given and false, the parameters and moments are the old ones.
    """
    if (fused := getattr(tx, "fused", None)) and fused.applies(params, grads):
        return fused.step(grads, moments, params, finite)  # type: ignore[no-any-return]
    updates, *owned = tx.update(grads, moments, params)

    def stepped(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        new = added(p, u)
        return new if finite is None else torch.where(finite, new, p)

    params = tree_map(stepped, params, updates)
    del updates
    return params, _chosen(finite, owned, moments)


def _chosen(finite: torch.Tensor | None, owned: list[PyTree], old: PyTree) -> PyTree:
    """The new tree, which nobody else holds, or the old one; leaf by leaf."""
    new = owned.pop()
    if finite is None:
        return new
    leaves, spec = tree_flatten(new)
    del new
    for i, leaf in enumerate(tree_leaves(old)):
        leaves[i] = torch.where(finite, leaves[i], leaf)
    return tree_unflatten(spec, leaves)


def consuming_update(
    tx: Any, grads: PyTree, owned: list[PyTree], finite: torch.Tensor | None = None
) -> tuple[Any, Any]:
    r"""The same bits from ``owned = [params, moments]``, which nobody else may hold.

    A ``leafwise`` transformation updates a group of leaves at a time, and the old ones
    of the group are let go: :math:`16\Psi/n` bytes of state stay about that (and
    :math:`4\Psi/n` of updates after a part that is not leafwise, such as a clip by
    global norm). Nothing is written over.
    """
    moments, params = owned.pop(), owned.pop()
    if halves := getattr(tx, "halves", ()):
        first, rest, cut = halves
        updates, done = first.update(grads, moments[:cut], params)
        done = _chosen(finite, [done], moments[:cut])
        owned = [params, moments[cut:]]
        del params, moments
        params, left = consuming_update(rest, updates, owned, finite)
        return params, (*done, *left)
    if not getattr(tx, "leafwise", False):
        return pure_update(tx, grads, moments, params, finite)
    spec, (leaves, outline) = tree_structure(params), tree_flatten(params, is_sharded)
    grad_leaves = tree_flatten(grads, is_sharded)[0]
    columns, rebuild = _mirrors(moments, spec)
    del params, moments
    for group in _groups(leaves):
        some_params = _only(outline, leaves, group)
        some_moments = rebuild([_only(outline, column, group) for column in columns])
        some_grads = _only(outline, grad_leaves, group)
        updated, new_moments = pure_update(
            tx, some_grads, some_moments, some_params, finite
        )
        new_columns, finish = _mirrors(new_moments, tree_structure(some_params))
        for column, new in zip(
            [leaves, *columns], [updated, *new_columns], strict=True
        ):
            flat = tree_flatten(new, is_sharded)[0] if new is updated else new
            for i, leaf in zip(group, flat, strict=True):
                column[i] = leaf
        del some_params, some_moments, updated, new_moments
    # Counts and other small things are whatever the last group made of them.
    new_trees = [tree_unflatten(outline, column) for column in columns]
    return tree_unflatten(outline, leaves), finish(new_trees)


def widen(x: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or in float64 if it is that; the dtype of arithmetic.

    Args:
      x: A floating tensor.

    Returns:
      ``x`` itself where it is wide enough.

    Examples:
      >>> widen(torch.ones(1, dtype=torch.bfloat16))
      tensor([1.])
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def added(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """``p + u`` in float32 at least, rounded once."""
    return (widen(p) + u).to(p.dtype)


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
    parts = [None if is_mirror(part) else part for part in parts]

    def rebuild(subtrees: list[PyTree]) -> PyTree:
        filled = list(parts)
        for i, subtree in zip(where, subtrees, strict=True):
            filled[i] = subtree
        return tree_unflatten(outer, filled)

    return columns, rebuild
