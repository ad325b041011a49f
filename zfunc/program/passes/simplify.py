# SPDX-License-Identifier: Apache-2.0
"""Fewer calls: no-op layouts go, views of views join, equal small values are shared."""

from __future__ import annotations

import operator
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.numbering import Numbers
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
    numbers = Numbers(ir.phase)
    for node in ir.calls_of(graph):
        same = _same_value(node)
        if same is None and node.target in RESHAPES:
            _look_through(node)
        if same is None:
            same = _shared(node, numbers.first(node))
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


def _shared(node: Node, first: Node) -> Node | None:
    """An earlier node of the same value, if it may be used in this one's place."""
    small = ir.val_bytes(node) <= SHARED_BYTES
    looks_at_the_same = ir.is_view(node) and first.args == node.args
    return first if first is not node and (small or looks_at_the_same) else None
