# SPDX-License-Identifier: Apache-2.0
"""Pytrees: optree in the namespace "zfunc", with paths in every error.

``torch.func`` flattens with a registry of its own that does not know our nodes, so
everything that calls it flattens here first; nothing is ever registered twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

import optree
import optree.dataclasses
import torch

from zfunc.core.errors import StructureError

NAMESPACE = "zfunc"
PyTree = Any
IsLeaf = Callable[[Any], bool] | None
T = TypeVar("T")


def static(**kwargs: Any) -> Any:
    """A field of a pytree dataclass that is metadata: structure, not a leaf.

    Example:
      >>> @pytree
      ... class Point:
      ...     x: int
      ...     unit: str = static(default="m")
      >>> tree_leaves(Point(1, "km"))
      [1]
    """
    make: Any = optree.dataclasses.field
    return make(pytree_node=False, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen dataclass and a pytree node; flattening is generated.

    Example:
      >>> @pytree
      ... class Pair:
      ...     a: int
      ...     b: int
      >>> tree_map(lambda x: x + 1, Pair(1, 2))
      Pair(a=2, b=3)
    """
    make: Any = optree.dataclasses.dataclass
    return make(cls, frozen=True, namespace=NAMESPACE)  # type: ignore[no-any-return]


def tree_flatten(
    tree: PyTree, is_leaf: IsLeaf = None
) -> tuple[list[Any], optree.PyTreeSpec]:
    """Leaves and structure of ``tree``. ``None`` is an empty subtree, as in JAX.

    Example:
      >>> tree_flatten({"b": 2, "a": (1, None)})[0]
      [1, 2]
    """
    return optree.tree_flatten(tree, is_leaf, namespace=NAMESPACE)


def tree_unflatten(spec: optree.PyTreeSpec, leaves: Any) -> PyTree:
    """The tree of structure ``spec`` with these leaves.

    Example:
      >>> leaves, spec = tree_flatten((1, [2]))
      >>> tree_unflatten(spec, leaves)
      (1, [2])
    """
    return optree.tree_unflatten(spec, leaves)


def tree_leaves(tree: PyTree, is_leaf: IsLeaf = None) -> list[Any]:
    """The leaves of ``tree``, dictionaries in key order.

    Example:
      >>> tree_leaves([1, {"z": 3, "y": 2}])
      [1, 2, 3]
    """
    return optree.tree_leaves(tree, is_leaf, namespace=NAMESPACE)


def tree_structure(tree: PyTree, is_leaf: IsLeaf = None) -> optree.PyTreeSpec:
    """The structure of ``tree``; placement is part of it (see ``Sharded``).

    Example:
      >>> tree_structure((1, 2)) == tree_structure((3, 4))
      True
    """
    return optree.tree_structure(tree, is_leaf, namespace=NAMESPACE)


def tree_map(
    fn: Callable[..., Any], tree: PyTree, *rest: PyTree, is_leaf: IsLeaf = None
) -> PyTree:
    """Apply ``fn`` leaf by leaf; all trees have one structure.

    Raises:
      StructureError: the structures differ; the message lists the paths.

    Example:
      >>> tree_map(lambda a, b: a * b, {"w": 2}, {"w": 5})
      {'w': 10}
    """
    leaves, spec = tree_flatten(tree, is_leaf)
    columns = [leaves]
    for other in rest:
        other_leaves, other_spec = tree_flatten(other, is_leaf)
        if other_spec != spec:
            check_structure(tree, other, "tree", "give trees of one structure.")
        columns.append(other_leaves)
    return tree_unflatten(spec, [fn(*row) for row in zip(*columns, strict=True)])


def leaves_with_path(tree: PyTree, is_leaf: IsLeaf = None) -> list[tuple[str, Any]]:
    """``(path, leaf)`` pairs; a path reads ``layers/0/w``.

    Example:
      >>> leaves_with_path({"layers": [{"w": 7}]})
      [('layers/0/w', 7)]
    """
    paths, leaves, _ = optree.tree_flatten_with_path(tree, is_leaf, namespace=NAMESPACE)
    return [
        ("/".join(map(str, path)), leaf)
        for path, leaf in zip(paths, leaves, strict=True)
    ]


def map_with_path(
    fn: Callable[[str, Any], Any], tree: PyTree, is_leaf: IsLeaf = None
) -> PyTree:
    """``tree_map`` whose function also receives the leaf's path.

    Example:
      >>> map_with_path(lambda path, x: f"{path}={x}", {"a": [1]})
      {'a': ['a/0=1']}
    """
    pairs = leaves_with_path(tree, is_leaf)
    return tree_unflatten(tree_structure(tree, is_leaf), [fn(p, x) for p, x in pairs])


def broadcast_prefix(prefix: PyTree, tree: PyTree, is_leaf: IsLeaf = None) -> list[Any]:
    """One entry of ``prefix`` per leaf of ``tree``: a prefix leaf serves its subtree.

    Example:
      >>> broadcast_prefix({"a": 1, "b": 2}, {"a": [0, 0], "b": 0})
      [1, 1, 2]
    """
    try:
        return optree.broadcast_prefix(prefix, tree, is_leaf, namespace=NAMESPACE)
    except (ValueError, TypeError) as error:
        raise StructureError(
            f"not a prefix of the tree: {error}\n"
            "Give one value for the whole tree, or a tree of the same keys."
        ) from None


def check_structure(expected: PyTree, got: PyTree, what: str, remedy: str) -> None:
    """Raise ``StructureError`` naming the paths where ``got`` is not like ``expected``.

    Example:
      >>> check_structure({"w": 1}, {"w": 2}, "moments", "")
    """
    if tree_structure(expected) == tree_structure(got):
        return
    want, have = dict(_described(expected)), dict(_described(got))
    lines = [f"{what} does not have the structure that is needed here:"]
    lines += [f"  missing: {path}" for path in want if path not in have][:8]
    lines += [f"  not expected: {path}" for path in have if path not in want][:8]
    lines += [
        f"  {path}: expected {want[path]}, got {have[path]}"
        for path in want
        if path in have and want[path] != have[path]
    ][:8]
    if len(lines) == 1:
        lines += [f"  expected {tree_structure(expected)}"]
        lines += [f"  got      {tree_structure(got)}"]
    raise StructureError("\n".join([*lines, remedy]))


def _described(tree: PyTree) -> list[tuple[str, str]]:
    """Paths and placements of a tree; a one-leaf node with metadata shows as itself."""

    def is_placed(node: Any) -> bool:
        return hasattr(node, "sharding")

    return [
        (path or "(root)", f"{leaf.sharding}" if is_placed(leaf) else "a leaf")
        for path, leaf in leaves_with_path(tree, is_placed)
    ]


def check_floating(tree: PyTree, what: str) -> None:
    """Raise ``TypeError`` naming the first leaf that cannot be differentiated.

    Example:
      >>> check_floating({"n": torch.arange(3)}, "params")
      Traceback (most recent call last):
      TypeError: params['n'] is torch.int64 and cannot be differentiated: ...
    """
    for path, leaf in leaves_with_path(tree):
        if not isinstance(leaf, torch.Tensor):
            kind = type(leaf).__name__
            if isinstance(leaf, torch.nn.Module):
                raise TypeError(
                    f"{what} has a module, {kind}: give its tensors, "
                    "dict(module.named_parameters()), and call it in the loss through "
                    "torch.func.functional_call(module, params, args)."
                )
            raise TypeError(
                f"{what}[{path!r}] is a {kind}, not a tensor: wrap it with "
                "torch.as_tensor(...), or close over it in the loss."
            )
        if not leaf.is_floating_point():
            raise TypeError(
                f"{what}[{path!r}] is {leaf.dtype} and cannot be differentiated: "
                "keep integer and complex leaves out of params: close over them in the "
                "loss."
            )
