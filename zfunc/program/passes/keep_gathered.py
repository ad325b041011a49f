# SPDX-License-Identifier: Apache-2.0
"""Keep gathered: re-gathers are undone while memory lasts, the best first."""

from __future__ import annotations

from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.numbering import Numbers
from zfunc.program.passes.chains import read_from, wait_of
from zfunc.program.program import Pass, Program

# What a message costs besides its bytes, as bytes: 0.2 ms at 2 GB/s (gloo, 2026-11-21).
MESSAGE_BYTES = 400_000


def keep_gathered(*, memory_limit_bytes: int) -> Pass:
    """Keep forward gathers for the backward, as far as the predicted peak allows.

    The benefit of keeping a parameter is a message and its bytes; the cost is its bytes
    of memory between the two uses. The largest benefit per byte goes first: small
    parameters, which cost latency and hardly any memory. Belongs after ``regather`` and
    before ``bucket``.

    Args:
      memory_limit_bytes: The most that the program's live tensors may take, on each
        rank. A limit below the peak without this pass keeps nothing.
    """
    limit = memory_limit_bytes
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"keep_gathered: memory_limit_bytes is a count; got {limit!r}")

    def kept(program: Program) -> Program:
        pairs = twins(program.graph)
        order = sorted(range(len(pairs)), key=lambda i: _cost_per_benefit(pairs[i]))
        low, high = 0, len(order)
        while low < high:  # the peak grows with every parameter that is kept
            middle = (low + high + 1) // 2
            trial = with_kept(program, order[:middle])
            if trial.memory_analysis().peak_bytes <= limit:
                low = middle
            else:
                high = middle - 1
        return with_kept(program, order[:low]) if low else program

    kept.__name__ = kept.__qualname__ = "keep_gathered"
    return kept


def _cost_per_benefit(pair: tuple[Node, Node]) -> float:
    held_bytes = ir.val_bytes(pair[0])
    return held_bytes / (held_bytes + MESSAGE_BYTES)


def twins(graph: Graph) -> list[tuple[Node, Node]]:
    """Gathers of the forward, each with that of the same value in the backward."""
    return [pair for one in ir.with_bodies(graph) for pair in _twins_in(one)]


def _twins_in(graph: Graph) -> list[tuple[Node, Node]]:
    numbers = Numbers()
    gathered: dict[Node, Node] = {}
    pairs = []
    for node in graph.nodes:
        value = numbers.first(node)
        if node.target is not ir.ALL_GATHER:
            continue
        if ir.phase(node) == "forward":
            gathered.setdefault(value, node)
        elif ir.phase(node) == "backward" and value in gathered:
            pairs.append((gathered[value], node))
    return pairs


def with_kept(program: Program, chosen: list[int]) -> Program:
    """The program with the chosen pairs sharing the forward's gather."""
    graph = ir.copied(program.graph)
    pairs = twins(graph)
    for i in chosen:
        first, again = pairs[i]
        read = read_from(again)
        wait_of(again).replace_all_uses_with(wait_of(first))
        for node in read:
            if node.target is not ir.WAIT:
                node.meta["val"] = ir.evaluate(node)  # it shares the kept storage now
    for one in ir.with_bodies(graph):
        ir.remove_dead(one)
        ir.check_order(one)
    return program.with_graph(graph)
