# SPDX-License-Identifier: Apache-2.0
"""Re-gather: a parameter used in the forward and in the backward is gathered twice.

This is what makes stage 3 of ZeRO out of a loss that knows nothing of it: between its
two uses a gathered parameter is not alive, nothing is recomputed, and the bytes on the
wire go from 2 Psi to 3 Psi. 12-layer Llama, 4 ranks: see docs/programs.md.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.passes.chains import from_inputs, read_from
from zfunc.program.program import Program, graph_pass


@graph_pass
def regather(graph: Graph, program: Program) -> None:
    """Gather again, in the backward, what the forward gathered inside the loss.

    Gathers outside of the loss (stages 1 and 2: once per step) stay as they are.
    """
    for start in ir.calls_of(graph):
        if start.target is ir.ALL_GATHER and ir.phase(start) == "forward":
            regather_one(graph, start)


def regather_one(graph: Graph, start: Node) -> bool:
    """Give the backward's uses of a gather one of their own; False if it has none."""
    sources = from_inputs(start)
    read = read_from(start)
    late = [
        user
        for node in read
        for user in node.users
        if user not in read and ir.phase(user) == "backward"
    ]
    if not late or sources is None:
        return False
    copies: dict[Node, Node] = {}
    place = min(late)
    wanted = _needed(late, {*sources, start, *read})
    with graph.inserting_before(place):
        for node in [*sources, start, *read]:
            if node in wanted:
                copies[node] = ir.copy_node(graph, node, copies)
                copies[node].meta["custom"] = {"phase": "backward"}
    for user in late:
        for old, new in copies.items():
            user.replace_input_with(old, new)
    return True


def _needed(users: list[Node], chain: set[Node]) -> set[Node]:
    """The nodes of the chain that the users depend on."""
    needed: set[Node] = set()
    waiting = list(users)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node in chain and node not in needed:
                needed.add(node)
                waiting.append(node)
    return needed
