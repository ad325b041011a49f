# SPDX-License-Identifier: Apache-2.0
"""The form of each collective that is fastest on gloo, with the eager step's sums.

gloo's reduce-scatter is one all-reduce per rank; an all-to-all and a sum on this rank
are 1.5 times faster. Sums are along the eager step's tree, so a program gives its bits.
Two ranks have one order only: there gloo's all-reduce gives them too, and is faster.
"""

from __future__ import annotations

import operator
from typing import Final

import torch
from torch.fx import Graph, Node

from zfunc.core.wire import SMALL_REDUCTION_ELEMENTS, first_half
from zfunc.program import ir
from zfunc.program.passes.chains import wait_of
from zfunc.program.program import Program, graph_pass

aten: Final = torch.ops.aten


@graph_pass
def collective_form(graph: Graph, program: Program) -> None:
    """Replace sums over gloo ranks; programs for NCCL and abstract meshes stay."""
    if program.device_type != "cpu":
        return
    for start in ir.calls_of(graph):
        if start.target not in (ir.REDUCE_SCATTER, ir.ALL_REDUCE):
            continue
        group = ir.group_of(start)
        if group.startswith("abstract:"):
            continue
        n = program.axis(group)[1]
        if start.target is ir.REDUCE_SCATTER:
            _by_all_to_all(graph, start, n)
        elif n > 2 or start.meta["val"].dtype not in (torch.float32, torch.float64):
            _by_parts(graph, start, n)


def _by_all_to_all(graph: Graph, start: Node, n: int) -> None:
    """Each rank receives its piece from all, and adds them up."""
    wait, sent = wait_of(start), start.args[0]
    splits = [start.meta["val"].shape[0]] * n
    with graph.inserting_before(start):
        moved = ir.emit(
            graph, ir.ALL_TO_ALL, sent, splits, splits, start.args[-1], like=start
        )
    with graph.inserting_before(wait):
        done = ir.emit(graph, ir.WAIT, moved, like=start)
        total = _folded(graph, done, n, start)
    wait.replace_all_uses_with(total)
    graph.erase_node(wait)
    graph.erase_node(start)


def _by_parts(graph: Graph, start: Node, n: int) -> None:
    """All-reduce as gather and fold (short), or as scatter, fold and gather (long)."""
    wait, group = wait_of(start), start.args[-1]
    x: Node = start.args[0]  # type: ignore[assignment]
    length = x.meta["val"].shape[0]
    short = length <= SMALL_REDUCTION_ELEMENTS
    with graph.inserting_before(start):
        if short:
            moved = ir.emit(graph, ir.ALL_GATHER, x, n, group, like=start)
        else:
            pad = [0, -length % n]
            if pad[1]:
                x = ir.emit(graph, aten.constant_pad_nd.default, x, pad, like=start)
            splits = [x.meta["val"].shape[0] // n] * n
            moved = ir.emit(graph, ir.ALL_TO_ALL, x, splits, splits, group, like=start)
    with graph.inserting_before(wait):
        done = ir.emit(graph, ir.WAIT, moved, like=start)
        total = _folded(graph, done, n, start)
        if not short:
            again = ir.emit(graph, ir.ALL_GATHER, total, n, group, like=start)
            total = ir.emit(graph, ir.WAIT, again, like=start)
            if total.meta["val"].shape[0] != length:
                total = ir.emit(
                    graph, aten.slice.Tensor, total, 0, 0, length, like=start
                )
    wait.replace_all_uses_with(total)
    graph.erase_node(wait)
    graph.erase_node(start)


def _folded(graph: Graph, received: Node, n: int, like: Node) -> Node:
    """The sum of n equal parts, along the tree of ``wire.fold_add``."""
    value = received.meta["val"]
    sizes = [value.shape[0] // n] * n
    parts = ir.emit(graph, aten.split_with_sizes.default, received, sizes, like=like)
    narrow = value.dtype.is_floating_point and value.dtype.itemsize < 4
    items = [ir.emit(graph, operator.getitem, parts, i, like=like) for i in range(n)]
    if narrow:
        items = [_cast(graph, item, torch.float32) for item in items]
    total = _tree_sum(graph, items, like)
    return _cast(graph, total, value.dtype) if narrow else total


def _tree_sum(graph: Graph, items: list[Node], like: Node) -> Node:
    if len(items) == 1:
        return items[0]
    half = first_half(len(items))
    left = _tree_sum(graph, items[:half], like)
    right = _tree_sum(graph, items[half:], like)
    return ir.emit(graph, aten.add.Tensor, left, right, like=like)


def _cast(graph: Graph, x: Node, dtype: torch.dtype) -> Node:
    made = graph.call_function(aten._to_copy.default, (x,), {"dtype": dtype})
    made.meta = {**x.meta, "val": ir.evaluate(made)}
    return made
