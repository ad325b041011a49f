# SPDX-License-Identifier: Apache-2.0
"""The structure of a metrics tree as JSON: containers and the paths of the leaves.

Everything else in a checkpoint gets its structure from the state it is restored into.
What a loss reports beside its value (``metrics.aux``) is known only after a step, so
its structure is stored, as data and without naming any class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import optree
import torch
from pydantic import BaseModel, ConfigDict, model_validator

from zfunc.core.tree import NAMESPACE, PyTree


class Skeleton(BaseModel):
    """One node: a leaf with its path in the state, nothing, or a container.

    Example:
      >>> Skeleton(kind="leaf", path="metrics/aux/accuracy").path
      'metrics/aux/accuracy'
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    kind: Literal["leaf", "none", "dict", "list", "tuple"]
    path: str | None = None
    keys: tuple[str | int, ...] = ()
    children: tuple[Skeleton, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Skeleton:
        if (self.path is not None) != (self.kind == "leaf"):
            raise ValueError(f"a node of kind {self.kind!r} with path {self.path!r}")
        if self.kind in ("leaf", "none") and self.children:
            raise ValueError(f"a node of kind {self.kind!r} with children")
        if len(self.keys) != (len(self.children) if self.kind == "dict" else 0):
            raise ValueError(
                f"a {self.kind} of {len(self.children)} with {len(self.keys)} keys"
            )
        return self

    def paths(self) -> Iterator[str]:
        """The paths of the leaves below this node."""
        if self.path is not None:
            yield self.path
        for child in self.children:
            yield from child.paths()


def skeleton_of(tree: PyTree, path: str) -> Skeleton:
    """The structure of ``tree``, which is at ``path`` in the state.

    Named tuples and dataclasses are stored as dictionaries of their fields; keys that
    are neither strings nor integers as their text.

    Example:
      >>> node = skeleton_of({"a": (torch.tensor(1.0), None)}, "metrics/aux")
      >>> list(node.paths())
      ['metrics/aux/a/0']
    """
    if tree is None:
        return Skeleton(kind="none")
    if optree.tree_is_leaf(tree, namespace=NAMESPACE):
        return Skeleton(kind="leaf", path=path)
    children, _, entries, _ = optree.tree_flatten_one_level(tree, namespace=NAMESPACE)
    nodes = tuple(
        skeleton_of(child, f"{path}/{entry}")
        for child, entry in zip(children, entries, strict=True)
    )
    fields = getattr(tree, "_fields", None)
    if type(tree) is list:
        return Skeleton(kind="list", children=nodes)
    if isinstance(tree, tuple) and fields is None:
        return Skeleton(kind="tuple", children=nodes)
    names = entries if fields is None else fields
    keys = tuple(k if type(k) in (str, int) else str(k) for k in names)
    return Skeleton(kind="dict", keys=keys, children=nodes)


def rebuilt(node: Skeleton, leaves: Mapping[str, torch.Tensor]) -> PyTree:
    """The tree of a skeleton, with the leaves found under their paths.

    Example:
      >>> tree = {"a": (torch.tensor(1.0), None)}
      >>> rebuilt(skeleton_of(tree, "aux"), {"aux/a/0": torch.tensor(2.0)})
      {'a': (tensor(2.), None)}
    """
    if node.path is not None:
        return leaves[node.path]
    children = [rebuilt(child, leaves) for child in node.children]
    if node.kind == "dict":
        return dict(zip(node.keys, children, strict=True))
    if node.kind == "none":
        return None
    return children if node.kind == "list" else tuple(children)


def plain_ints(tree: Any) -> Any:
    """A tree of integers as JSON: a data cursor, say. Named fields become keys.

    Raises:
      TypeError: something in it is not an integer, with its path.

    Example:
      >>> plain_ints({"shard": (0, 3)})
      {'shard': [0, 3]}
    """
    return _plain_ints(tree, "cursor")


def _plain_ints(tree: Any, path: str) -> Any:
    if type(tree) is int or tree is None:
        return tree
    if isinstance(tree, tuple) and hasattr(tree, "_asdict"):
        tree = tree._asdict()
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        tree = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    if isinstance(tree, dict) and all(type(key) is str for key in tree):
        return {key: _plain_ints(x, f"{path}.{key}") for key, x in tree.items()}
    if isinstance(tree, list | tuple):
        return [_plain_ints(x, f"{path}[{i}]") for i, x in enumerate(tree)]
    raise TypeError(
        f"{path} is a {type(tree).__name__}: a cursor is made of integers (int(x) for "
        "a tensor) in named tuples, dataclasses, lists and dictionaries with text keys."
    )
