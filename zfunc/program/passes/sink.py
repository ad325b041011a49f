# SPDX-License-Identifier: Apache-2.0
"""Sink: a gather starts where its result is first used, and lives from there."""

from __future__ import annotations

from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.passes.chains import is_layout
from zfunc.program.program import Program, graph_pass


@graph_pass
def sink(graph: Graph, program: Program) -> None:
    """Move gathers, and the layouts around them, down to their first use.

    A backend lets go of each value right after its last use; with this pass a gathered
    parameter is alive between its first use and its last, and not longer.
    """
    for node in reversed(ir.calls_of(graph)):
        gather = node.target is ir.ALL_GATHER or (
            node.target is ir.WAIT and node.args[0].target is ir.ALL_GATHER  # type: ignore[union-attr]
        )
        if node.users and (gather or _is_cheap(node)):
            min(node.users).prepend(node)


def _is_cheap(node: Node) -> bool:
    """A view, or a copy that is no smaller than what it would keep alive."""
    if not is_layout(node):
        return False
    read = sum(map(ir.val_bytes, node.all_input_nodes))
    return ir.is_view(node) or ir.val_bytes(node) >= read
