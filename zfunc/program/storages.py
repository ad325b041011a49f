# SPDX-License-Identifier: Apache-2.0
"""The storages behind the values of a graph: which, how large, and what they hold.

Memory is counted in storages: views share one, and so do a collective's result and what
its wait returns (fake tensors say otherwise).
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.listing import op_name, sends
from zfunc.transforms.loop import SumOver

aten: Final = torch.ops.aten
# The same numbers in new memory.
_COPIES: Final = frozenset(
    {
        aten._to_copy.default,
        aten._unsafe_view.default,
        aten.cat.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
        aten.slice_backward.default,
        aten.split_with_sizes_copy.default,
    }
)
_SCALINGS: Final = frozenset({aten.div.Tensor, aten.mul.Tensor})

# For each value of a node the number of its storage, None for what is no tensor.
Parts = tuple[int | None, ...]


@dataclass(frozen=True)
class Storages:
    """What the nodes of one graph hold.

    ``held`` are the storages of each node's values, ``outputs`` those of the outputs,
    ``kinds`` says what is in a storage, ``bodies`` are the storages of the loops. The
    inputs of a loop's body have no bytes: they are the operands' own.
    """

    held: Mapping[Node, Parts]
    outputs: tuple[int | None, ...]
    size_bytes: Mapping[int, int]
    kinds: Mapping[int, str]
    bodies: Mapping[Node, Storages]


def storages_of(
    graph: Graph, inputs: Sequence[str], outputs: Sequence[str], *, inner: bool = False
) -> Storages:
    """The storages of a graph, given the kinds of its inputs and outputs.

    Args:
      graph: A program's graph, or with ``inner`` the body of a loop.
      inputs: For each input "params", "batch", ... or "other".
      outputs: The same for each output.
      inner: True for a loop's body.
    """
    held, size_bytes = held_in(graph)
    given = ir.inputs_of(graph)
    kinds: dict[int, str] = {}

    def mark(nodes: Any, kind: str) -> None:
        for node in nodes:
            for key in present(held[node]):
                kinds.setdefault(key, kind)

    for node, kind in zip(given, inputs, strict=True):
        mark([node], kind)
        if inner:
            size_bytes.update(dict.fromkeys(present(held[node]), 0))
    mark(_gathered(graph, dict(zip(given, inputs, strict=True))), "gathered")
    results = ir.outputs_of(graph)
    for node, kind in zip(results, outputs, strict=True):
        if kind in ("params", "moments"):
            mark([node], kind)
    pairs = zip(results, outputs, strict=True)
    gradients = _on_the_way([node for node, kind in pairs if kind == "grads"])
    mark(gradients, "grads")
    mark(_saved(graph, held), "activations")
    mark(ir.calls_of(graph), "other")
    bodies = {}
    for node, loop in ir.bodies(graph):
        sums = _loop_outputs(node, gradients)
        keys = [held[n][0] for n in node.args]  # type: ignore[index]
        operands = ["other" if key is None else kinds[key] for key in keys]
        bodies[node] = storages_of(loop.body, operands, sums, inner=True)
    returned = tuple(held[node][0] for node in results)
    return Storages(held, returned, size_bytes, kinds, bodies)


def present(parts: Parts) -> list[int]:
    """Each storage once."""
    return [key for key in dict.fromkeys(parts) if key is not None]


def held_in(graph: Graph) -> tuple[dict[Node, Parts], dict[int, int]]:
    """The storages of each node's values, in their order; and the sizes in bytes.

    A view has its input's storage, whatever its fake value says: passes move views to
    other inputs.
    """
    held: dict[Node, Parts] = {}
    size_bytes: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        values, source = _values(node), node.all_input_nodes[:1]
        if node.target is operator.getitem:
            held[node] = (held[source[0]][node.args[1]],)
        elif _only_looks(node):
            held[node] = (held[source[0]][0],) * len(values)
        else:
            held[node] = _made(node, values, held, size_bytes)
    return held, size_bytes


def _values(node: Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _only_looks(node: Node) -> bool:
    return node.op == "call_function" and (
        ir.is_view(node) or op_name(node.target) == "wait"
    )


def _made(
    node: Node, values: list[Any], held: dict[Node, Parts], size_bytes: dict[int, int]
) -> Parts:
    """New storages, but where a value is in the memory of one of the inputs."""
    known: dict[int, int] = {}
    for given in node.all_input_nodes:
        for value, key in zip(_values(given), held[given], strict=True):
            if key is not None:
                known[value.untyped_storage()._cdata] = key
    parts: list[int | None] = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            parts.append(None)
            continue
        storage = value.untyped_storage()
        key = known.setdefault(storage._cdata, len(size_bytes))
        size_bytes.setdefault(key, storage.nbytes())
        parts.append(key)
    return tuple(parts)


def _gathered(graph: Graph, given: Mapping[Node, str]) -> list[Node]:
    """Parameters made whole, or cast for use; their pieces on the way to the wire."""
    weights = {node for node, kind in given.items() if kind in ("params", "gathered")}
    whole = {node for node, kind in given.items() if kind == "gathered"}
    for node in ir.calls_of(graph):
        sources = node.all_input_nodes
        gather = sends(node) and op_name(node.target) == "all_gather"
        if not sources or not weights.issuperset(sources):
            continue
        if not (gather or _same_numbers(node)):
            continue
        weights.add(node)
        if gather or ir.phase(node) or whole.intersection(sources):
            whole.add(node)
    return [node for node in whole if node not in given]


def _same_numbers(node: Node) -> bool:
    return (
        ir.is_view(node) or node.target in _COPIES or op_name(node.target) == "wait"
    ) and not _takes_sum(node)


def _takes_sum(node: Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and isinstance(source.target, SumOver)


def _on_the_way(results: list[Node]) -> dict[Node, None]:
    """Values that are added up, sent, cast or scaled to make gradients, and those."""
    found: dict[Node, None] = {}
    waiting = list(results)
    while waiting:
        node = waiting.pop()
        if node in found or node.op != "call_function":
            continue
        found[node] = None
        if _takes_sum(node):
            continue
        if _of_many(node):
            waiting.extend(_predecessor(node))
        elif _same_numbers(node) or sends(node):
            waiting.extend(node.all_input_nodes)
        elif node.target is aten.add.Tensor or _scales(node):
            waiting.extend(n for n in node.all_input_nodes if _shape(n) == _shape(node))
    return found


def _of_many(node: Node) -> bool:
    """One of the results of a call over many leaves."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and hasattr(source.target, "operand_of")


def _predecessor(node: Node) -> list[Node]:
    """The leaf that such a result takes the place of."""
    source: Any = node.args[0]
    where = source.target.operand_of(node.args[1])
    return [] if where is None else [source.args[where[0]][where[1]]]


def _scales(node: Node) -> bool:
    return node.target in _SCALINGS and any(
        not _shape(n) for n in node.all_input_nodes[1:]
    )


def _shape(node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _saved(graph: Graph, held: Mapping[Node, Parts]) -> list[Node]:
    """What the forward makes and the backward uses, itself or through a view."""
    makers: dict[int, Node] = {}
    used: set[int] = set()
    for node in ir.calls_of(graph):
        for key in present(held[node]):
            makers.setdefault(key, node)
        if ir.phase(node) == "backward":
            used.update(key for n in node.all_input_nodes for key in present(held[n]))
    return [
        maker
        for key, maker in makers.items()
        if key in used and ir.phase(maker) == "forward"
    ]


def _loop_outputs(loop: Node, gradients: Mapping[Node, None]) -> list[str]:
    """The kinds of a loop's sums."""
    target: Any = loop.target
    kinds = ["other"] * len(ir.outputs_of(target.body))
    for user in loop.users:
        if user in gradients and _takes_sum(user):
            kinds[user.args[1]] = "grads"  # type: ignore[index]
    return kinds
