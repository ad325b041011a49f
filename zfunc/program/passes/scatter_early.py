# SPDX-License-Identifier: Apache-2.0
"""Reduce early: a gradient is sent as soon as it exists, and its memory is free again.

Traced as it runs, stages 0 to 2 reduce after the whole backward, when all full
gradients are alive.
"""

from __future__ import annotations

from torch.fx import Graph

from zfunc.program import ir
from zfunc.program.passes.chains import made_by, wait_of
from zfunc.program.program import Program, graph_pass

REDUCTIONS = (ir.REDUCE_SCATTER, ir.ALL_REDUCE)


@graph_pass
def scatter_early(graph: Graph, program: Program) -> None:
    """Move each reduction, with its wait, right after the node that makes its input."""
    for start in ir.calls_of(graph):
        if start.target not in REDUCTIONS:
            continue
        chain = [*made_by(start), start]
        outside = [n for node in chain for n in node.all_input_nodes if n not in chain]
        place = max(outside)
        if place.op == "placeholder":
            place = ir.inputs_of(graph)[-1]
        for node in [*chain, wait_of(start)]:
            place.append(node)
            place = node
