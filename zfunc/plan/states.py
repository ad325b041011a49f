# SPDX-License-Identifier: Apache-2.0
"""Model states: what of a program's memory waits, read off its graph.

The ZeRO paper divides memory into model states (weights, gradients, optimizer states)
and the rest. In a traced program, where every value lives from its making to its last
use, the model states are the bytes that wait for another part of the step:

* *state*: parameters and moments, which wait from one step to the next;
* *weights*: low-precision or gathered copies of parameters that are used in the forward
  and again in the backward, or by every microbatch; a copy that is made for one use is
  none of them;
* *gradients*: in the form in which they wait for the update. Where every gradient is
  reduced as it is made that is what reductions give, else what the backward makes.

The three are never alive all at once: weights go as gradients come. Their sum is what a
program that freed nothing early would need, which is the paper's account.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.memory import BytesByKind
from zfunc.program.passes.chains import is_layout
from zfunc.program.program import Program, paths_by_node
from zfunc.program.storages import Storages, present, storages_of
from zfunc.transforms.loop import SumOver

_REDUCTIONS: Final = (ir.REDUCE_SCATTER, ir.ALL_REDUCE)


class ModelStates(NamedTuple):
    """Bytes of one rank that wait; see the module.

    Example:
      >>> ModelStates(params=4, moments=8, weights=2, gradients=2).total
      16
    """

    params: int
    moments: int
    weights: int
    gradients: int

    @property
    def total(self) -> int:
        """Bytes of all four."""
        return sum(self)

    def scaled(self, at_next: ModelStates, more: int) -> ModelStates:
        """Those ``more`` layers beyond ``at_next``, which has one layer more."""
        pairs = zip(self, at_next, strict=True)
        return ModelStates(*(b + more * (b - a) for a, b in pairs))


def model_states(program: Program) -> ModelStates:
    """The model states of a program."""
    graph = program.graph
    kinds = [
        [k if k in BytesByKind._fields else "other" for k in map(program.kind, paths)]
        for paths in (program.inputs, program.outputs)
    ]
    storages = storages_of(graph, *kinds)
    of_inputs = {
        kind: _bytes(
            storages,
            (n for n, p in paths_by_node(program).items() if program.kind(p) == kind),
        )
        for kind in ("params", "moments")
    }
    params = {n for n, p in paths_by_node(program).items() if p.startswith("params")}
    return ModelStates(
        **of_inputs,
        weights=_weights(graph, storages, params),
        gradients=_gradients(program, storages),
    )


def _bytes(storages: Storages, nodes: Iterable[Node]) -> int:
    keys = {key for node in nodes for key in present(storages.held[node])}
    return sum(storages.size_bytes[key] for key in keys)


def _weights(graph: Graph, storages: Storages, given: set[Node]) -> int:
    """Bytes of the copies of ``given`` that are used in more than one part."""
    copies = set(given)
    for node in ir.calls_of(graph):
        sources = node.all_input_nodes
        moves = is_layout(node) or node.target in (ir.ALL_GATHER, ir.WAIT)
        if moves and sources and copies.issuperset(sources):
            copies.add(node)
    users = defaultdict[int, set[str]](set)
    for node in copies:
        for key in present(storages.held[node]):
            users[key].update(_parts(node, copies))
    own = {key for node in given for key in present(storages.held[node])}
    waiting = [key for key, parts in users.items() if len(parts) > 1 and key not in own]
    total = sum(storages.size_bytes[key] for key in waiting)
    for node, loop in ir.bodies(graph):
        inputs = zip(ir.inputs_of(loop.body), node.args, strict=True)
        whole = {inner for inner, outer in inputs if outer in copies}
        total += _weights(loop.body, storages.bodies[node], whole)
    return total


def _parts(node: Node, copies: set[Node]) -> Iterator[str]:
    """The parts of the step that use a node, and not only to copy it once more."""
    for user in node.users:
        if isinstance(user.target, SumOver):
            yield from ("first microbatch", "next microbatch")
        elif user not in copies:
            yield ir.phase(user)


def _gradients(program: Program, storages: Storages) -> int:
    graph = program.graph
    sums = [
        key
        for node, _ in ir.bodies(graph)
        for key in present(storages.held[node])
        if storages.kinds[key] == "grads"
    ]
    if sums:
        return sum(storages.size_bytes[key] for key in sums)
    starts = [n for n in ir.calls_of(graph) if _reduces_gradient(n, storages)]
    if not starts:  # one rank
        outputs = zip(ir.outputs_of(graph), program.outputs, strict=True)
        return _bytes(storages, (n for n, p in outputs if program.kind(p) == "grads"))
    chains = [_chain(start) for start in starts]
    within = {node for chain in chains for node in chain}
    computing = [n for n in ir.calls_of(graph) if n not in within and _computes(n)]
    if all(_follows(chain, computing) for chain in chains):
        return _bytes(storages, starts)
    end = computing[-1]
    waiting = (
        next((n for n in reversed(chain[:-1]) if not n > end), chain[0])
        for chain in chains
    )
    return _bytes(storages, waiting)


def _reduces_gradient(node: Node, storages: Storages) -> bool:
    if node.target not in _REDUCTIONS:
        return False
    keys = present(storages.held[node.all_input_nodes[0]])
    return all(storages.kinds[key] == "grads" for key in keys)


def _chain(start: Node) -> list[Node]:
    """What makes a whole gradient, its casts and layouts, and its reduction."""
    chain = [start]
    while True:
        source: Any = chain[-1].all_input_nodes[0]
        chain.append(source)
        if source.target is operator.getitem or not is_layout(source):
            return chain[::-1]


def _computes(node: Node) -> bool:
    """Whether a node is arithmetic of the backward."""
    moves = is_layout(node) or ir.is_collective(node) or node.target is ir.WAIT
    return ir.phase(node) == "backward" and not moves


def _follows(chain: list[Node], computing: list[Node]) -> bool:
    """Whether the backward computes nothing between a gradient and its reduction."""
    made, reduced = chain[0], chain[-1]
    return not any(made < node < reduced for node in computing)
