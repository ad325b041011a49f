# SPDX-License-Identifier: Apache-2.0
"""Value numbering: which nodes of a graph compute the same value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch.fx import Node


class Numbers:
    """A number for each value, by the call and the numbers it is made of.

    (A value written out in full doubles with every node that reads another twice.)
    Random numbers, and whatever is not an operator of torch, are equal to themselves.

    Args:
      apart: Nodes are equal only if this is, too.
    """

    def __init__(self, apart: Callable[[Node], Hashable] = lambda node: None) -> None:
        self._apart = apart
        self._of: dict[Node, int] = {}
        self._first: dict[Any, Node] = {}

    def first(self, node: Node) -> Node:
        """The first node of this value; asked for every node, in the graph's order."""
        first = self._first.setdefault(self._key(node), node)
        self._of[node] = self._of.get(first, len(self._of))
        return first

    def _key(self, node: Node) -> Any:
        target: Any = node.target
        pure = isinstance(target, torch._ops.OpOverload) and (
            torch.Tag.nondeterministic_seeded not in target.tags
        )
        if not pure and target is not operator.getitem:
            return node
        args = torch.fx.map_arg(
            (node.args, node.kwargs), lambda n: f"%{self._of.get(n, n)}"
        )
        return target, repr(args), self._apart(node)
