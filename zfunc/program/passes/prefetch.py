# SPDX-License-Identifier: Apache-2.0
"""Prefetch: messages are under way while the work before them is done."""

from __future__ import annotations

from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.passes.chains import (
    from_inputs,
    move_before,
    read_from,
    wait_of,
)
from zfunc.program.program import Pass, Program, graph_pass


def prefetch(*, gathers: int = 2, scatters: int = 2) -> Pass:
    """Start gathers some units ahead, and wait for reductions some units late.

    Args:
      gathers: How many gathered messages may be under way, or waiting for their use,
        besides the one in use. 0: each starts where it is used.
      scatters: How many reductions may be under way; more keep more full gradients
        alive. 0: each is waited for at once.
    """
    for name, count in (("gathers", gathers), ("scatters", scatters)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"prefetch: {name} is a count; got {count!r}")

    def prefetched(graph: Graph, program: Program) -> None:
        _start_early(graph, gathers)
        _wait_late(graph, scatters)

    return graph_pass(prefetched)


def _start_early(graph: Graph, ahead: int) -> None:
    starts = [n for n in ir.calls_of(graph) if n.target is ir.ALL_GATHER]
    waits = [wait_of(start) for start in starts]
    for i, start in enumerate(starts):
        sources = from_inputs(start)
        if sources is not None and i and ahead:
            move_before([*sources, start], waits[max(i - ahead, 0)])


def _wait_late(graph: Graph, in_flight: int) -> None:
    kinds = (ir.REDUCE_SCATTER, ir.ALL_REDUCE)
    starts = [n for n in ir.calls_of(graph) if n.target in kinds]
    for i, start in enumerate(starts if in_flight else []):
        for node in reversed(read_from(start)):  # what only looks at the result
            if ir.is_view(node) and node.users:
                min(node.users).prepend(node)
        wait = wait_of(start)
        limit: Node | None = None
        if i + in_flight < len(starts):
            limit = starts[i + in_flight]
        users = [*wait.users, *([limit] if limit is not None else [])]
        place = min(users)
        if place > wait:
            place.prepend(wait)
