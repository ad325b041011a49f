# SPDX-License-Identifier: Apache-2.0
"""In place: results of calls on many leaves over operands that nothing needs any more.

The last thing that happens to a program's graph: after it the order of the graph is not
only that of its edges.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import Counter, defaultdict
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.batched import Batched
from zfunc.program.list_calls import ListCall
from zfunc.program.listing import sends
from zfunc.program.program import Program, paths_by_node
from zfunc.program.storages import held_in, present
from zfunc.transforms.loop import SumOver

# Operators that tell the truth, by their fake results, about whose memory they return.
_NAMESPACES: Final = frozenset({"aten", "_c10d_functional", "zfunc"})


def write_over(program: Program) -> Program:
    """The program with batched results over operands, where that changes no value.

    An operand is written over if it is a donated input, or made by the program in
    memory of its own, and neither it nor a view of it is used by another operand, later
    on, or by a message that is still under way.
    """
    graph = ir.copied(program.graph)
    paths = paths_by_node(dataclasses.replace(program, graph=graph))
    kept = {node for node, path in paths.items() if path not in program.donated}
    for node in ir.calls_of(graph):
        if isinstance(node.target, Batched):
            _write_over(node, node.target, _Memory(graph, kept))
        elif isinstance(node.target, ListCall) and node.target.in_place is not None:
            _run_twin(node, node.target, _Memory(graph, kept))
    return program.with_graph(graph)


def written_over(graph: Graph) -> set[Node]:
    """The operands that batched calls and kernels write over."""
    found: set[Node] = set()
    for node in ir.calls_of(graph):
        if isinstance(node.target, ListCall) and node.target.over:
            found.update(node.target.leaves(node.args))
        elif isinstance(node.target, Batched):
            for j, flags in enumerate(node.target.over):
                if any(flags):
                    leaves = zip(_column(node, node.target, j), flags, strict=True)
                    found.update(leaf for leaf, over in leaves if over)
    return found


def _column(node: Node, batched: Batched, j: int) -> list[Node]:
    """The leaves that the j-th output of a batched call may be written over."""
    column = batched.chain.wholes[j].column
    return [] if column is None else list(node.args[column])  # type: ignore[arg-type]


def _write_over(node: Node, batched: Batched, memory: _Memory) -> None:
    """Set the flags of one call, and whose memory its results are in."""
    flags, values = [], list(node.meta["val"])
    items: dict[int, Node] = {user.args[1]: user for user in node.users}  # type: ignore[misc]
    num_leaves = len(batched.strides)
    for j in range(batched.num_outputs):
        leaves = _column(node, batched, j)
        row = [False] * num_leaves
        for i, leaf in enumerate(leaves):
            place = j * num_leaves + i
            row[i] = memory.is_free(leaf, node, values[place])
            if row[i]:
                values[place] = leaf.meta["val"]
                if place in items:
                    items[place].meta["val"] = leaf.meta["val"]
        flags.append(tuple(row))
    node.target = dataclasses.replace(batched, over=tuple(flags))
    node.meta["val"] = values


def _run_twin(node: Node, call: ListCall, memory: _Memory) -> None:
    """The kernel in place, if it may write over all that it would."""
    leaves, values = call.leaves(node.args), list(node.meta["val"])
    pairs = zip(leaves, values, strict=False)
    if not all(memory.is_free(leaf, node, value) for leaf, value in pairs):
        return
    values[: len(leaves)] = [leaf.meta["val"] for leaf in leaves]
    node.target = dataclasses.replace(call, over=True)
    node.meta["val"] = values
    for user in node.users:
        user.meta["val"] = values[user.args[1]]  # type: ignore[index]


class _Memory:
    """Who holds each storage of a graph, and until when."""

    def __init__(self, graph: Graph, kept: set[Node]) -> None:
        self._kept = kept
        self._where: dict[Node, int] = {n: i for i, n in enumerate(graph.nodes)}
        self._holders = defaultdict[int, list[Node]](list)
        # Not by fake values alone: passes move views to other inputs.
        self._held, _ = held_in(graph)
        for node in self._held:
            for key in self._keys(node):
                self._holders[key].append(node)

    def is_free(self, leaf: Node, call: Node, result: torch.Tensor) -> bool:
        """Whether a call may write this result over one of its operands."""
        value, keys = leaf.meta["val"], self._keys(leaf)
        whole = value.untyped_storage().nbytes() == value.nbytes
        if len(keys) != 1 or not whole or not _alike(value, result):
            return False
        operands = Counter(_flat(call.args))
        for holder in self._holders[keys[0]]:
            if holder in self._kept or not _is_known(holder):
                return False
            if operands[holder] > (holder is leaf):
                return False
            if any(self._end(user) > self._where[call] for user in holder.users):
                return False
        return True

    def _keys(self, node: Node) -> list[int]:
        return present(self._held[node])

    def _end(self, user: Node) -> int:
        """When a node has read what it is given; a message has after its wait."""
        if not sends(user):
            return self._where[user]
        ends = [self._where[user]]
        waiting = list(user.users)
        while waiting:
            node = waiting.pop()
            ends.append(self._where[node])
            if node.target is operator.getitem:
                waiting.extend(node.users)
        return max(ends)


def _flat(args: Any) -> list[Node]:
    """Every node among arguments, as often as it is there."""
    if isinstance(args, Node):
        return [args]
    if isinstance(args, (list, tuple)):
        return [node for arg in args for node in _flat(arg)]
    return []


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.device) == (
        b.shape,
        b.stride(),
        b.dtype,
        b.device,
    )


def _is_known(node: Node) -> bool:
    """Whether a fake result says whose memory the real one is in."""
    target = node.target
    if node.op == "placeholder" or isinstance(target, (Batched, ListCall)):
        return True
    if target is operator.getitem:
        return _is_known(node.args[0])  # type: ignore[arg-type]
    if isinstance(target, SumOver):
        return target.n > 1  # of one microbatch the results are not added to anything
    return isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES
