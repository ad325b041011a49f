# SPDX-License-Identifier: Apache-2.0
"""Fewer calls: no-op layouts go, views of views join, equal small values are shared."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.program import Program, graph_pass

aten: Final = torch.ops.aten
# Larger equal values may be the two ends of a recomputation: sharing them would keep
# alive what remat lets go.
SHARED_BYTES: Final = 1024
SAME_VALUE: Final = frozenset(
    {
        aten.detach.default,
        aten.alias.default,
        aten.lift_fresh_copy.default,
        aten.view.default,
        aten._unsafe_view.default,
        aten.expand.default,
        aten.permute.default,
        aten.slice.Tensor,
        aten._to_copy.default,
    }
)
RESHAPES: Final = frozenset({aten.view.default, aten._unsafe_view.default})


@graph_pass
def simplify(graph: Graph, program: Program) -> None:
    """Remove what computes nothing; the same values bit for bit."""
    numbers = _Numbers()
    for node in ir.calls_of(graph):
        same = _same_value(node)
        if same is None and node.target in RESHAPES:
            _look_through(node)
        if same is None:
            same = numbers.earlier(node)
        if same is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _same_value(node: Node) -> Node | None:
    """The input that a node returns as it is, if it does."""
    target: Any = node.target
    if target is operator.getitem:
        split: Any = node.args[0]
        if split.target is aten.split_with_sizes.default and len(split.args[1]) == 1:
            return split.args[0]  # type: ignore[no-any-return]
        return None
    first = node.args[0] if node.args else None
    if not isinstance(first, Node):
        return None
    if target is aten.pow.Tensor_Scalar and node.args[1] == 1 and _alike(node, first):
        return first
    if target in SAME_VALUE and _alike(node, first):
        return first
    if target is aten.t.default and first.target is aten.t.default:
        return first.args[0]  # type: ignore[return-value]
    return None


def _alike(node: Node, other: Node) -> bool:
    a, b = node.meta.get("val"), other.meta.get("val")
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return False
    return (a.shape, a.stride(), a.dtype, a.device) == (
        b.shape,
        b.stride(),
        b.dtype,
        b.device,
    )


def _look_through(node: Node) -> None:
    """A view of a view becomes a view of the first one's input, where it can."""
    inner: Any = node.args[0]
    while inner.target in RESHAPES:
        base = inner.args[0]
        try:
            value = base.meta["val"].view(node.meta["val"].shape)
        except RuntimeError:
            return
        if value.stride() != node.meta["val"].stride():
            return
        node.args = (base, list(node.meta["val"].shape))
        node.target, inner = aten.view.default, base


class _Numbers:
    """Which nodes compute equal values: a number for each, by what it is made of."""

    def __init__(self) -> None:
        self.of: dict[Node, int] = {}
        self.first: dict[Any, Node] = {}

    def earlier(self, node: Node) -> Node | None:
        """An earlier node of the same value that may be used in this one's place."""
        first = self.first.setdefault(self._key(node), node)
        self.of[node] = self.of.get(first, len(self.of))
        small = ir.val_bytes(node) <= SHARED_BYTES
        looks_at_the_same = ir.is_view(node) and first.args == node.args
        shared = first is not node and (small or looks_at_the_same)
        return first if shared else None

    def _key(self, node: Node) -> Any:
        target: Any = node.target
        pure = isinstance(target, torch._ops.OpOverload) and (
            torch.Tag.nondeterministic_seeded not in target.tags
        )
        if not pure and target is not operator.getitem:
            return node
        args = torch.fx.map_arg(
            (node.args, node.kwargs), lambda n: f"%{self.of.get(n, n)}"
        )
        return target, repr(args), ir.phase(node)
