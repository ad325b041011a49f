# SPDX-License-Identifier: Apache-2.0
"""The optimizer's calls leaf by leaf.

An update is written transformation by transformation, so a program has all leaves'
first calls, then all leaves' second ones: nothing that follows on each other could be
fused, and every gradient waits for the last one. Leaf by leaf is the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from torch.fx import Node

from zfunc.program import ir
from zfunc.program.backends.unbatched import is_store


def leaf_by_leaf(
    calls: list[Node],
    reads: Callable[[Node], Iterable[Node]],
    is_fixed: Callable[[Node], bool],
) -> list[Node]:
    """The calls with those behind the last of the loss or its gradient sorted by leaf.

    ``reads`` are the calls whose values a call reads; those that are fixed keep their
    place, and nothing is moved across them.
    """
    last = max((i for i, n in enumerate(calls) if ir.phase(n)), default=len(calls))
    ordered = calls[: last + 1]
    for fixed, group in groupby(calls[last + 1 :], is_fixed):
        stretch = list(group)
        ordered += stretch if fixed else _sorted_stretch(stretch, reads)
    return ordered


def _sorted_stretch(
    calls: list[Node], reads: Callable[[Node], Iterable[Node]]
) -> list[Node]:
    """Stages of single numbers and of leaves in turn; in a stage, leaf by leaf.

    Numbers (the learning rate, a global norm) are shared by all leaves: they come as
    early as they can, a leaf's calls as late as they can, so that they come together.
    """
    place = {node: i for i, node in enumerate(calls)}
    read = {node: [n for n in reads(node) if n in place] for node in calls}
    numbers = {node for node in calls if is_number(node)}
    stage = _stages(calls, read, numbers)
    leaf = {node: node for node in calls}

    def root(node: Node) -> Node:
        while leaf[node] is not node:
            leaf[node] = leaf[leaf[node]]
            node = leaf[node]
        return node

    for node in calls:
        for other in read[node]:
            if (other in numbers) == (node in numbers):
                a, b = sorted((root(other), root(node)), key=place.__getitem__)
                leaf[b] = a
    return sorted(calls, key=lambda n: (stage[n], place[root(n)], place[n]))


def _stages(
    calls: list[Node], read: dict[Node, list[Node]], numbers: set[Node]
) -> dict[Node, int]:
    """No call is in an earlier stage than what it reads; numbers, leaves, numbers."""

    def step(a: Node, b: Node) -> int:
        return (a in numbers) != (b in numbers)

    stage: dict[Node, int] = {}
    for node in calls:
        steps = [stage[n] + step(n, node) for n in read[node]]
        stage[node] = max(steps, default=0)
    latest = dict.fromkeys(calls, max(stage.values()))
    for node in reversed(calls):
        if node in numbers:
            latest[node] = stage[node]
        for n in read[node]:
            latest[n] = min(latest[n], latest[node] - step(n, node))
    for node in filter(is_store, calls):  # with the value that it writes
        after = [latest[n] + step(n, node) for n in read[node]]
        latest[node] = max(after, default=latest[node])
    return latest


def number_cuts(calls: list[Node]) -> list[int]:
    """The places outside of the loss where numbers end and leaves begin.

    A number that is computed in the same piece as the leaves that read it would be
    computed once for each element of them.
    """
    return [
        i
        for i in range(1, len(calls))
        if not (ir.phase(calls[i - 1]) or ir.phase(calls[i]))
        and is_number(calls[i - 1])
        and not is_number(calls[i])
    ]


def is_number(node: Node) -> bool:
    """True for arithmetic on single numbers; the sum of a leaf is of that leaf."""
    around = [node, *node.all_input_nodes]
    return all(x.numel() == 1 for n in around for x in ir.tensors_of(n))
