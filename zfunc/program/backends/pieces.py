# SPDX-License-Identifier: Apache-2.0
"""A program cut into pieces that are compiled, with the other calls between them.

Not compiled are collectives, loops (their bodies are programs of their own), calls that
write into their inputs or draw random numbers, and what is no torch operator. A view
costs nothing, so whatever needs one makes it: no piece returns a view, and no two
tensors that leave a piece share memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.backends import order, regions

aten = torch.ops.aten


@dataclass(eq=False)
class Piece:
    """Calls that follow on each other, the values they are given and those they give.

    ``body`` are the piece's calls with the views that they need, in order.
    """

    calls: list[Node]
    body: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    def key(self) -> Any:
        """Equal for pieces that compute the same, whatever their values are called."""
        where = {node: ("input", i) for i, node in enumerate(self.inputs)}
        where |= {node: ("body", i) for i, node in enumerate(self.body)}
        given = tuple(described(node) for node in self.inputs)
        return given, tuple(_token(node, where.__getitem__) for node in self.body)

    def graph(self, outputs: list[Node]) -> Graph:
        """The piece as a graph of its own, from its inputs to these outputs."""
        graph, made = Graph(), {}
        for i, node in enumerate(self.inputs):
            made[node] = graph.placeholder(f"x{i}")
            made[node].meta["val"] = node.meta["val"]
        for i, node in enumerate(self.body):
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), made.__getitem__)
            made[node] = graph.create_node(
                "call_function", node.target, args, kwargs, f"v{i}"
            )
            made[node].meta["val"] = node.meta["val"]
        graph.output([made[node] for node in outputs])
        return graph


Part = Piece | Node


def parts_of(graph: Graph) -> list[Part]:
    """The program as pieces and the calls between them, in order.

    It is cut at the calls that are not compiled, and where layers begin and end, so
    that equal layers are equal pieces.
    """
    calls = [n for n in ir.calls_of(graph) if not is_view(n) and not _is_item(n)]
    calls = order.leaf_by_leaf(calls, lambda n: sources(n, calls_only=True), is_fixed)
    parts = list(_with_short_ones_apart(_split(calls, _layer_cuts(calls))))
    home = {node: part for part in parts for node in _calls_of(part)}
    for part in parts:
        if isinstance(part, Piece):
            _complete(part, home)
    _find_outputs(graph, parts, home)
    return parts


def is_view(node: Node) -> bool:
    """True for a node that any part may compute again, as it only looks at memory."""
    if _is_item(node):
        return is_view(node.args[0])  # type: ignore[arg-type]
    return node.target is aten._unsafe_view.default or ir.is_view(node)


def is_fixed(node: Node) -> bool:
    """True for a call that is left to run as it is."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return target.namespace != "aten" or target._schema.is_mutable or _draws(node)


def sources(node: Node, *, calls_only: bool = False) -> list[Node]:
    """What a node reads, seen through views: inputs of the program and calls."""
    found: dict[Node, None] = {}
    todo = list(node.all_input_nodes)
    while todo:
        read = todo.pop()
        if is_view(read) or (calls_only and _is_item(read)):
            todo += read.all_input_nodes
        elif not (calls_only and read.op == "placeholder"):
            found[read] = None
    return list(found)


def described(node: Node) -> Any:
    """All that a compiler needs to know of a node's tensors."""
    return tuple(
        (x.dtype, tuple(x.shape), x.stride(), x.device) for x in ir.tensors_of(node)
    )


def _is_item(node: Node) -> bool:
    return node.target is operator.getitem


def _draws(node: Node) -> bool:
    """True for a call that draws random numbers; attention without dropout does not."""
    target: Any = node.target
    if torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    values = {a.name: a.default_value for a in target._schema.arguments}
    values |= dict(zip(values, node.args, strict=False)) | node.kwargs
    return values.get("dropout_p") != 0.0


def _token(node: Node, name: Callable[[Node], Any]) -> Any:
    """What a call is, with its operands by name: hashable, and told apart by type."""
    return (
        node.target,
        _frozen(node.args, name),
        _frozen(node.kwargs, name),
        described(node),
    )


def _frozen(x: Any, name: Callable[[Node], Any]) -> Any:
    match x:
        case Node():
            return name(x)
        case list() | tuple():
            return tuple(_frozen(value, name) for value in x)
        case dict():
            return tuple((key, _frozen(value, name)) for key, value in x.items())
    return type(x), repr(x) if isinstance(x, float) else x  # 0.0 == -0.0


def _layer_cuts(calls: list[Node]) -> set[int]:
    place = {node: i for i, node in enumerate(calls)}
    row = regions.numbered([_token(node, lambda _: None) for node in calls])
    reads = [[place[n] for n in sources(node, calls_only=True)] for node in calls]
    return set(regions.cuts(row, reads))


def _split(calls: list[Node], cuts: set[int]) -> Iterator[Part]:
    group: list[Node] = []
    for i, node in enumerate(calls):
        if group and (i in cuts or is_fixed(node)):
            yield Piece(group)
            group = []
        if is_fixed(node):
            yield node
        else:
            group.append(node)
    if group:
        yield Piece(group)


def _with_short_ones_apart(parts: Iterator[Part]) -> Iterator[Part]:
    """A single call has nothing to be fused with: it runs as it is."""
    for part in parts:
        if isinstance(part, Piece) and len(part.calls) == 1:
            yield part.calls[0]
        else:
            yield part


def _calls_of(part: Part) -> list[Node]:
    return part.calls if isinstance(part, Piece) else [part]


def _complete(piece: Piece, home: dict[Node, Part]) -> None:
    """Add the views that a piece's calls need, and find its inputs."""
    seen: set[Node] = set()

    def add(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        inside = home.get(_made_by(node)) is piece
        if not inside and not is_view(node):
            piece.inputs.append(node)
            return
        for read in node.all_input_nodes:
            add(read)
        piece.body.append(node)

    for node in piece.calls:
        add(node)
        for user in node.users:
            if _is_item(user):
                add(user)


def _made_by(node: Node) -> Node:
    """The call whose result a node is, or is an item of."""
    return node.args[0] if _is_item(node) else node  # type: ignore[return-value]


def _find_outputs(graph: Graph, parts: list[Part], home: dict[Node, Part]) -> None:
    read: dict[Node, None] = {}
    for part in parts:
        if isinstance(part, Piece):
            read.update(dict.fromkeys(part.inputs))
        else:
            read.update(dict.fromkeys(sources(part)))
    end = next(iter(reversed(graph.nodes)))
    read.update(dict.fromkeys(sources(end)))
    for node in read:
        origin = home.get(_made_by(node))
        if isinstance(origin, Piece):
            origin.outputs.append(node)
