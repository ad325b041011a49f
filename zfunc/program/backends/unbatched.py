# SPDX-License-Identifier: Apache-2.0
"""Batched updates as the elementwise calls that they stand for, for a compiler to fuse.

A result that is written over an operand stays so: the call ``store`` is the value of
that operand from there on.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.backends.views import is_view
from zfunc.program.batched import Batched
from zfunc.program.chain import Call, Ref

aten = torch.ops.aten


def store(column: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Write a value over a column that nothing else needs any more."""
    return column.copy_(value)


def is_store(node: Node) -> bool:
    """True for a call that writes a value over another."""
    return node.target is store


def unbatched(graph: Graph) -> Graph:
    """The graph with each ``Batched`` call replaced by its calls, leaf by leaf."""
    if not any(isinstance(node.target, Batched) for node in graph.nodes):
        return graph
    made = ir.copied(graph)
    for node in ir.calls_of(made):
        if isinstance(node.target, Batched):
            with made.inserting_before(node):
                results = _results(made, node, node.target)
            for item in list(node.users):
                if item.target is not operator.getitem:
                    raise AssertionError(f"{item.format_node()} takes all results")
                item.replace_all_uses_with(results[item.args[1]])  # type: ignore[index]
                made.erase_node(item)
            made.erase_node(node)
    ir.remove_dead(made)
    return made


def _results(graph: Graph, node: Node, batched: Batched) -> list[Node]:
    """The nodes for the results of a batched call, in its order."""
    chain, columns = batched.chain, node.args[: batched.chain.num_columns]
    scalars = node.args[batched.chain.num_columns :]
    outputs: list[list[Node]] = [[] for _ in range(batched.num_outputs)]
    sums: list[list[Node]] = [[] for _ in batched.sums]
    for i in range(len(batched.strides)):
        leaves = [column[i] for column in columns]  # type: ignore[index]
        values: list[Node] = []
        known: dict[str, Any] = {"column": leaves, "value": values, "scalar": scalars}
        for call in chain.calls:  # each may read those before it
            values += [_emitted(graph, call, known)]
        for j, column in enumerate(outputs):
            whole = chain.wholes[j]
            result = values[whole.value]
            if batched.over[j][i]:
                result = _stored(graph, leaves[whole.column or 0], result)  # type: ignore[arg-type]
            column.append(result)
        for place, column in zip(batched.sums, sums, strict=True):
            value = values[chain.wholes[place].value]
            column.append(ir.emit(graph, aten.sum.default, value))
    return [result for column in (*outputs, *sums) for result in column]


def _emitted(graph: Graph, call: Call, known: dict[str, Any]) -> Node:
    args = [known[a.kind][a.place] if isinstance(a, Ref) else a for a in call.args]
    if call.target is not aten._to_copy.default:
        return ir.emit(graph, call.target, *args)
    node = graph.call_function(call.target, tuple(args), {"dtype": call.dtype})
    node.meta["val"] = ir.evaluate(node)
    return node


def _stored(graph: Graph, column: Node, value: Node) -> Node:
    """The value where the column was; a view is not worth the trouble."""
    if is_view(column):
        return value
    node = graph.call_function(store, (column, value))
    node.meta["val"] = column.meta["val"]
    return node
