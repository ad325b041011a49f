# SPDX-License-Identifier: Apache-2.0
"""The graph of a program, and what passes do to it.

A program is a ``torch.fx.Graph`` of aten and ``_c10d_functional`` operators; the fake
tensor that a node computes is in ``node.meta["val"]``, so shapes, dtypes and which
tensors share a storage are known without running anything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch.fx import Graph, Node
from torch.fx.experimental import proxy_tensor

from zfunc.core.tree import tree_leaves
from zfunc.transforms.loop import SumOver

aten: Final = torch.ops.aten
c10d: Final = torch.ops._c10d_functional
ALL_GATHER: Final = c10d.all_gather_into_tensor.default
REDUCE_SCATTER: Final = c10d.reduce_scatter_tensor.default
ALL_REDUCE: Final = c10d.all_reduce.default
ALL_TO_ALL: Final = c10d.all_to_all_single.default
WAIT: Final = c10d.wait_tensor.default
COLLECTIVES: Final = frozenset({ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE, ALL_TO_ALL})


def tensors_of(node: Node) -> list[torch.Tensor]:
    """The fake tensors that a node computes."""
    return [x for x in tree_leaves(node.meta.get("val")) if _is_tensor(x)]


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def storages(node: Node) -> list[tuple[int, int]]:
    """(identity, bytes) of each storage that a node's tensors live in."""
    found = {}
    for x in tensors_of(node):
        storage = x.untyped_storage()
        found[storage._cdata] = storage.nbytes()
    return list(found.items())


def val_bytes(node: Node) -> int:
    """Bytes of the elements of a node's tensors (not of the storages behind views)."""
    return sum(x.numel() * x.element_size() for x in tensors_of(node))


def is_collective(node: Node) -> bool:
    """True for a node that sends; its result may be used after the ``wait`` only."""
    return node.target in COLLECTIVES


def group_of(node: Node) -> str:
    """The process group's name in a collective's arguments."""
    return str(node.args[-1])


def phase(node: Node) -> str:
    """What of the loss a node is of: "forward", "backward", or "" (neither)."""
    return str(node.meta.get("custom", {}).get("phase", ""))


def is_view(node: Node) -> bool:
    """True for a node that computes nothing: it only looks at its input's storage."""
    if node.target is operator.getitem:
        return True
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and (target.is_view or target in (aten.detach.default, aten.alias.default))
        and target.namespace == "aten"
    )


def emit(
    graph: Graph, target: Callable[..., Any], *args: Any, like: Node | None = None
) -> Node:
    """Insert a call at the graph's insertion point, its fake value computed.

    ``like`` gives the new node its phase.
    """
    node = graph.call_function(target, args)
    node.meta["val"] = evaluate(node)
    if like is not None and "custom" in like.meta:
        node.meta["custom"] = like.meta["custom"]
    return node


def evaluate(node: Node) -> Any:
    """The fake value of a node from the fake values of its inputs."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    known = [x for n in node.all_input_nodes for x in tensors_of(n)]
    mode = torch._guards.detect_fake_mode(known)
    if mode is None:
        raise AssertionError(f"no fake tensor among the inputs of {node.format_node()}")
    with mode, torch.no_grad(), proxy_tensor.disable_proxy_modes_tracing():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def copy_node(graph: Graph, node: Node, replaced: dict[Node, Node]) -> Node:
    """The same call on replaced inputs, with a fake value (a storage) of its own."""
    made = graph.node_copy(node, lambda n: replaced.get(n, n))
    made.meta = dict(node.meta)
    made.meta["val"] = evaluate(made)
    return made


def copied(graph: Graph) -> Graph:
    """A graph, with its loops' bodies, that can be changed without changing this one.

    Fake values are shared.
    """
    made = Graph()
    val_map: dict[Node, Node] = {}
    output = made.graph_copy(graph, val_map)
    made.output(output)
    for old, new in val_map.items():
        new.meta = dict(old.meta)
    for node, loop in bodies(made):
        node.target = SumOver(copied(loop.body), loop.n, loop.num_sliced)
    return made


def with_bodies(graph: Graph) -> Iterator[Graph]:
    """The bodies of all loops in a graph, inner ones first, and the graph itself."""
    for _, loop in bodies(graph):
        yield from with_bodies(loop.body)
    yield graph


def inputs_of(graph: Graph) -> list[Node]:
    """The placeholders, in order."""
    return [n for n in graph.nodes if n.op == "placeholder"]


def outputs_of(graph: Graph) -> list[Node]:
    """The nodes that are returned, in order."""
    last: Any = next(iter(reversed(graph.nodes)))
    return list(last.args[0])


def calls_of(graph: Graph) -> list[Node]:
    """The calls, in order."""
    return [n for n in graph.nodes if n.op == "call_function"]


def bodies(graph: Graph) -> Iterator[tuple[Node, SumOver]]:
    """The loops of a graph, not those inside their bodies."""
    for node in graph.nodes:
        if isinstance(node.target, SumOver):
            yield node, node.target


def last_uses(graph: Graph) -> dict[Node, list[Node]]:
    """For each node, the inputs that nothing after it needs."""
    seen: set[Node] = set()
    last: dict[Node, list[Node]] = {}
    for node in reversed(graph.nodes):
        dying = [n for n in dict.fromkeys(node.all_input_nodes) if n not in seen]
        seen.update(dying)
        last[node] = dying
    return last


def remove_dead(graph: Graph) -> None:
    """Erase calls that nothing uses; inputs stay, and so do random draws."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and not _draws(node):
            graph.erase_node(node)


def _draws(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded in tags


def shape_text(x: torch.Tensor) -> str:
    """``f32[4, 8]``."""
    short = str(x.dtype).removeprefix("torch.")
    for long, brief in (("float", "f"), ("complex", "c"), ("uint", "u"), ("int", "i")):
        short = short.replace(long, brief)
    return f"{short}[{', '.join(map(str, x.shape))}]"


def check_order(graph: Graph) -> None:
    """Raise ``AssertionError`` for a node that comes before one of its inputs."""
    seen: set[Node] = set()
    for node in graph.nodes:
        late: Sequence[Node] = [n for n in node.all_input_nodes if n not in seen]
        if late:
            raise AssertionError(f"{node} comes before its inputs {late}")
        seen.add(node)
