# SPDX-License-Identifier: Apache-2.0
"""A program cut into pieces that are compiled, with the other calls between them.

Not compiled are collectives, loops (their bodies are programs of their own), calls that
write into their inputs or draw random numbers, and what is no torch operator. A view
costs nothing, so whatever needs one makes it: no piece returns a view, and no two
tensors that leave a piece share memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.backends import order, regions, remade
from zfunc.program.backends.unbatched import is_store
from zfunc.program.backends.views import is_item, is_view, made_by, readers, sources
from zfunc.transforms.loop import SumOver

aten = torch.ops.aten


@dataclass(eq=False)
class Piece:
    """Calls that follow on each other, the values they are given and those they give.

    ``body`` are the piece's calls with the views that they need, in order, and with
    those of ``remade``: calls of other pieces that this one makes again. Where these
    read a value that was written over another, that is read: ``stored`` says which.
    """

    calls: list[Node]
    stored: dict[Node, Node] = field(default_factory=dict)
    remade: set[Node] = field(default_factory=set)
    body: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    @property
    def stores(self) -> list[tuple[Node, Node]]:
        """The inputs of the program that the piece writes over, and with what."""
        return [node.args for node in self.body if is_store(node)]  # type: ignore[misc]

    def key(self) -> Any:
        """Equal for pieces that compute the same, whatever their values are called."""
        where = {node: ("input", i) for i, node in enumerate(self.inputs)}
        where |= {node: ("body", i) for i, node in enumerate(self.body)}
        where = self._with_stored(where)
        given = tuple(described(node) for node in self.inputs)
        return given, tuple(_token(node, where.__getitem__) for node in self.body)

    def graph(self, outputs: list[Node]) -> Graph:
        """The piece as a graph of its own, from its inputs to these outputs."""
        graph, made = Graph(), {}
        for i, node in enumerate(self.inputs):
            made[node] = graph.placeholder(f"x{i}")
            made[node].meta["val"] = node.meta["val"]
        made = self._with_stored(made)
        for i, node in enumerate(self.body):
            if is_store(node):
                made[node] = made[node.args[1]]  # type: ignore[index]
                continue
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), made.__getitem__)
            made[node] = graph.create_node(
                "call_function", node.target, args, kwargs, f"v{i}"
            )
            made[node].meta["val"] = node.meta["val"]
        for column, value in self.stores:
            graph.call_function(aten.copy_.default, (made[column], made[value]))
        graph.output([made[node] for node in outputs])
        return graph

    def _with_stored(self, known: dict[Node, Any]) -> dict[Node, Any]:
        """What is known of stores, as known of the values that they hold."""
        held = {v: known[node] for v, node in self.stored.items() if node in known}
        return held | known


Part = Piece | Node


def parts_of(graph: Graph) -> list[Part]:
    """The program as pieces and the calls between them, in order.

    It is cut at the calls that are not compiled, and where layers begin and end, so
    that equal layers are equal pieces.
    """
    calls = [n for n in ir.calls_of(graph) if not is_view(n) and not is_item(n)]
    calls = order.leaf_by_leaf(calls, _must_follow, is_fixed)
    parts = list(_with_short_ones_apart(_split(calls, _layer_cuts(calls))))
    home = {node: part for part in parts for node in _calls_of(part)}
    stored = _settle_stores(parts, home)
    for piece in pieces_of(parts):
        piece.stored = {v: n for v, n in stored.items() if home.get(v) is not piece}
        _complete(piece, home)
    _remake(graph, parts, home)
    for piece in pieces_of(parts):
        _complete(piece, home)
    _find_outputs(graph, parts, home)
    return parts


def pieces_of(parts: list[Part]) -> list[Piece]:
    """The pieces among the parts of a program."""
    return [part for part in parts if isinstance(part, Piece)]


def is_fixed(node: Node) -> bool:
    """True for a call that is left to run as it is."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return not is_store(node)
    return target.namespace != "aten" or target._schema.is_mutable or _draws(node)


def described(node: Node) -> Any:
    """All that a compiler needs to know of a node's tensors."""
    return tuple(
        (x.dtype, tuple(x.shape), x.stride(), x.device) for x in ir.tensors_of(node)
    )


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
    return {*regions.cuts(row, reads), *order.number_cuts(calls)}


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
    piece.body, piece.inputs = [], []

    def add(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        inside = home.get(made_by(node)) is piece or node in piece.remade
        if not inside and not is_view(node):
            piece.inputs.append(node)
            return
        for read in node.all_input_nodes:
            add(piece.stored.get(read, read))
        piece.body.append(node)

    for node in piece.calls:
        add(node)
        for user in node.users:
            if is_item(user):
                add(user)


def _settle_stores(parts: list[Part], home: dict[Node, Part]) -> dict[Node, Node]:
    """Leave a stored value in one place, from which all other parts read it.

    A piece does not write over a value that it makes: it need not keep it at all.
    Returns the store of each stored value.
    """
    stored: dict[Node, Node] = {}
    for piece in pieces_of(parts):
        for node in [n for n in piece.calls if is_store(n)]:
            column: Any = node.args[0]
            value: Any = node.args[1]
            if home.get(made_by(column)) is piece:
                node.replace_all_uses_with(value)
                piece.calls.remove(node)
                continue
            if home.get(made_by(value)) is not piece:
                continue  # others may read it before it is stored
            stored[value] = node
            for user in list(value.users):
                if home.get(user) is not piece:
                    user.replace_input_with(value, node)
    return stored


def _find_outputs(graph: Graph, parts: list[Part], home: dict[Node, Part]) -> None:
    read = [node for piece in pieces_of(parts) for node in piece.inputs]
    for node in dict.fromkeys([*read, *_read_apart(graph, parts)]):
        origin = home.get(made_by(node))
        if isinstance(origin, Piece) and not is_store(node):
            origin.outputs.append(node)


def _read_apart(graph: Graph, parts: list[Part]) -> list[Node]:
    """What is read by the calls that are not compiled, and what is returned."""
    end = next(iter(reversed(graph.nodes)))
    apart = [part for part in parts if isinstance(part, Node)]
    return [source for node in [*apart, end] for source in sources(node)]


def _remake(graph: Graph, parts: list[Part], home: dict[Node, Part]) -> None:
    number = {part: i for i, part in enumerate(parts)}
    place = {node: number[part] for node, part in home.items()}
    place |= {n: place[made_by(n)] for n in graph.nodes if made_by(n) in place}
    written: dict[Node, int] = {}
    for i, part in enumerate(parts):
        for node in _calls_of(part):
            for source in _written_by(node):
                written.setdefault(source, i)
    by_number = {number[p]: p for p in pieces_of(parts)}
    given = {i: dict.fromkeys(piece.inputs) for i, piece in by_number.items()}
    kept = frozenset(_read_apart(graph, parts))
    stored = {v: n for piece in by_number.values() for v, n in piece.stored.items()}

    def reads(node: Node) -> list[Node]:
        return [stored.get(source, source) for source in sources(node)]

    places = remade.Places(place, given, kept, written, reads, readers)
    for i, calls in remade.values_to_remake(places).items():
        by_number[i].remade = calls


def _written_by(node: Node) -> list[Node]:
    """What a call may write over."""
    target = node.target
    if is_store(node):
        return [node.args[0]]  # type: ignore[list-item]
    if isinstance(target, torch._ops.OpOverload):
        return sources(node) if target._schema.is_mutable else []
    return [] if isinstance(target, SumOver) else sources(node)


def _must_follow(node: Node) -> list[Node]:
    """The calls behind which a call has to stay; a store stays behind all readers."""
    before = sources(node, calls_only=True)
    if is_store(node):
        before += [n for n in readers(node.args[0]) if n is not node]  # type: ignore[arg-type]
    return before
