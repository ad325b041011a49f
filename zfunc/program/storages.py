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


@dataclass(frozen=True)
class Storages:
    """What the nodes of one graph hold.

    ``held`` are the keys of each node's storages (of the i-th output's alone in
    ``outputs``), ``kinds`` says what is in a storage, ``bodies`` are those of the
    loops. The inputs of a loop's body have no bytes: they are the operands' own.
    """

    held: Mapping[Node, tuple[int, ...]]
    outputs: tuple[tuple[int, ...], ...]
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
    held, size_bytes = _held(graph)
    given = ir.inputs_of(graph)
    kinds: dict[int, str] = {}

    def mark(nodes: Any, kind: str) -> None:
        for node in nodes:
            for key in held[node]:
                kinds.setdefault(key, kind)

    for node, kind in zip(given, inputs, strict=True):
        mark([node], kind)
        if inner:
            size_bytes.update(dict.fromkeys(held[node], 0))
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
        operands = [
            kinds[held[n][0]] if held[n] else "other" for n in operands_of(node)
        ]
        bodies[node] = storages_of(loop.body, operands, sums, inner=True)
    return Storages(held, tuple(held[n] for n in results), size_bytes, kinds, bodies)


def operands_of(loop: Node) -> list[Node]:
    """The operands of a loop's node, one for each input of its body."""
    return [n for n in loop.args if isinstance(n, Node)]


def _held(graph: Graph) -> tuple[dict[Node, tuple[int, ...]], dict[int, int]]:
    held: dict[Node, tuple[int, ...]] = {}
    size_bytes: dict[int, int] = {}
    same: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        found = ir.storages(node)
        if node.op == "call_function" and op_name(node.target) == "wait":
            (source,) = node.all_input_nodes
            for (mine, _), its in zip(found, held[source], strict=True):
                same[mine] = its
        for key, size in found:
            size_bytes.setdefault(same.get(key, key), size)
        held[node] = tuple(dict.fromkeys(same.get(key, key) for key, _ in found))
    return held, size_bytes


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
        if _same_numbers(node) or sends(node):
            waiting.extend(node.all_input_nodes)
        elif node.target is aten.add.Tensor or _scales(node):
            waiting.extend(n for n in node.all_input_nodes if _shape(n) == _shape(node))
    return found


def _scales(node: Node) -> bool:
    return node.target in _SCALINGS and any(
        not _shape(n) for n in node.all_input_nodes[1:]
    )


def _shape(node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _saved(graph: Graph, held: Mapping[Node, tuple[int, ...]]) -> list[Node]:
    """What the forward makes and the backward uses, itself or through a view."""
    makers: dict[int, Node] = {}
    used: set[int] = set()
    for node in ir.calls_of(graph):
        for key in held[node]:
            makers.setdefault(key, node)
        if ir.phase(node) == "backward":
            used.update(key for n in node.all_input_nodes for key in held[n])
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
