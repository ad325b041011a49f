# SPDX-License-Identifier: Apache-2.0
"""What stands around a collective: how its input is made, what is read from it."""

from __future__ import annotations

from typing import Final

import torch
from torch.fx import Graph, Node

from zfunc.program import ir

aten: Final = torch.ops.aten
# One cheap read and write at most: worth doing again rather than keeping the result.
COPIES: Final = frozenset(
    {
        aten._to_copy.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
        aten.split_with_sizes_copy.default,
        aten.slice_backward.default,
        aten._unsafe_view.default,
        aten.cat.default,
    }
)


def is_layout(node: Node) -> bool:
    """True for views, copies and casts: the same numbers in another layout."""
    return node.op == "call_function" and (ir.is_view(node) or node.target in COPIES)


def read_from(start: Node) -> list[Node]:
    """The wait of a collective and all layouts of what it delivers, in order."""
    found = dict.fromkeys([start])
    for node in found_in_order(start.graph, start):
        if (
            node.target is ir.WAIT
            or (is_layout(node) and node.target is not aten.cat.default)
        ) and any(n in found for n in node.all_input_nodes):
            found[node] = None
    return list(found)[1:]


def found_in_order(graph: Graph, start: Node) -> list[Node]:
    """Descendants of a node, in the graph's order."""
    seen: dict[Node, None] = {}
    waiting = [start]
    while waiting:
        for user in waiting.pop().users:
            if user not in seen and user.op == "call_function":
                if user.target is ir.WAIT or is_layout(user):
                    waiting.append(user)
                seen[user] = None
    return sorted(seen)


def made_by(node: Node) -> list[Node]:
    """The layouts that make a collective's input and serve nothing else, in order."""
    chain: dict[Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        candidate = waiting.pop()
        users = [u for u in candidate.users if u is not node and u not in chain]
        if is_layout(candidate) and not users:
            chain[candidate] = None
            waiting.extend(candidate.all_input_nodes)
    return sorted(chain)


def from_inputs(node: Node) -> list[Node] | None:
    """The layouts that lead from the graph's inputs to a node, in order.

    None where something else is computed on the way: the node cannot move up at will.
    """
    chain: dict[Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        candidate = waiting.pop()
        if candidate.op == "placeholder" or candidate in chain:
            continue
        if not is_layout(candidate):
            return None
        chain[candidate] = None
        waiting.extend(candidate.all_input_nodes)
    return sorted(chain)


def wait_of(start: Node) -> Node:
    """The node that waits for a collective."""
    return next(user for user in start.users if user.target is ir.WAIT)


def move_before(nodes: list[Node], place: Node) -> None:
    """Move nodes, in their order, in front of another; those already there stay."""
    for node in nodes:
        if node is not place and not node < place:
            place.prepend(node)
