# SPDX-License-Identifier: Apache-2.0
"""Cast before gather: what is used in a narrower dtype only travels in that dtype."""

from __future__ import annotations

from typing import Final

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.passes.chains import read_from
from zfunc.program.program import Program, graph_pass
from zfunc.transforms.loop import SumOver

CAST: Final = torch.ops.aten._to_copy.default


@graph_pass
def cast_before_gather(graph: Graph, program: Program) -> None:
    """Cast each shard before it is gathered, where all that use the whole cast it.

    Rounding is elementwise, so it commutes with the gather: half the bytes for the same
    bits. The master weights stay as they are. A cast that every microbatch repeats is
    done once, before the loop.
    """
    for node, loop in ir.bodies(graph):
        _cast_before_loop(graph, node, loop)
    for start in ir.calls_of(graph):
        if start.target is ir.ALL_GATHER:
            _cast_first(graph, start)


def _cast_before_loop(graph: Graph, node: Node, loop: SumOver) -> None:
    for i, inner in enumerate(ir.inputs_of(loop.body)):
        dtypes = {u.meta["val"].dtype for u in inner.users if u.target is CAST}
        if i < loop.num_sliced or len(dtypes) != 1:
            continue
        casts = [u for u in inner.users if u.target is CAST]
        if len(casts) < len(inner.users) or not _narrows(inner, casts[0]):
            continue
        with graph.inserting_before(node):
            narrow = graph.node_copy(casts[0], lambda _, i=i: node.args[i])  # type: ignore[misc]
        narrow.meta = {**node.args[i].meta, "val": ir.evaluate(narrow)}  # type: ignore[union-attr]
        node.update_arg(i, narrow)
        inner.meta["val"] = casts[0].meta["val"]
        for cast in casts:
            cast.replace_all_uses_with(inner)
            loop.body.erase_node(cast)


def _narrows(before: Node, cast: Node) -> bool:
    old, new = before.meta["val"], cast.meta["val"]
    narrower: bool = new.dtype.itemsize < old.dtype.itemsize
    return narrower and new.dtype.is_floating_point and new.stride() == old.stride()


def _cast_first(graph: Graph, start: Node) -> None:
    read = read_from(start)
    casts = [n for n in read if n.target is CAST and _casts_first(n, read)]
    layouts = [n for n in read if n not in casts and not _after(n, casts)]
    outside = [u for n in layouts for u in n.users if u not in read]
    dtypes = {n.meta["val"].dtype for n in casts}
    if len(dtypes) != 1 or outside:
        return
    dtype, stored = dtypes.pop(), start.meta["val"].dtype
    if not dtype.is_floating_point or dtype.itemsize >= stored.itemsize:
        return
    with graph.inserting_before(start):
        narrow = graph.call_function(CAST, (start.args[0],), {"dtype": dtype})
        narrow.meta = {**start.meta, "val": ir.evaluate(narrow)}
    start.args = (narrow, *start.args[1:])
    for node in [start, *layouts]:
        node.meta["val"] = ir.evaluate(node)
    for cast in casts:
        cast.replace_all_uses_with(cast.args[0])  # type: ignore[arg-type]
        graph.erase_node(cast)
    for node in read:
        if node not in casts and node not in layouts:
            node.meta["val"] = ir.evaluate(node)


def _casts_first(node: Node, read: list[Node]) -> bool:
    """A cast of what was gathered, not a cast of a cast."""
    return node.meta["val"].dtype != node.args[0].meta["val"].dtype and not _after(  # type: ignore[union-attr]
        node, [n for n in read if n.target is CAST]
    )


def _after(node: Node, casts: list[Node]) -> bool:
    waiting, seen = list(node.all_input_nodes), set()
    while waiting:
        other = waiting.pop()
        if other in casts:
            return True
        if other not in seen and other.op == "call_function":
            seen.add(other)
            waiting.extend(other.all_input_nodes)
    return False
