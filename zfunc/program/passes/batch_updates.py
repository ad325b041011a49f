# SPDX-License-Identifier: Apache-2.0
"""Batch updates: the optimizer's elementwise calls, in few launches.

After the gradients exist a program is the same chain of elementwise calls for every
leaf. Chains of one form become one ``Batched`` call. What must be whole before others
(the global norm, between the division by the weight and the clip) cuts the chains.
"""

from __future__ import annotations

import heapq
import operator
from collections import defaultdict
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.batched import Batched, Task
from zfunc.program.chain import Chain, Whole, compiled
from zfunc.program.passes.leaf_calls import Leaf, leaves_of
from zfunc.program.program import Pass, Program

# Elements. Six float32 chunks fit two caches of 1 MiB, and two threads have a grain of
# work each (32768).
CHUNK_NUMEL: Final = 2**16
# To join leaves is to copy each column and each result, which costs about two launches
# for a small leaf. A leaf of more elements than this is better launched alone.
JOINED_NUMEL: Final = 2**12


def batch_updates(
    *, chunk_numel: int = CHUNK_NUMEL, joined_numel: int = JOINED_NUMEL
) -> Pass:
    """Run the elementwise calls outside of the loss in chunks of many leaves.

    Calls on leaves of other strides than their moments stay as they are, and so do
    programs that write in place outside of the loss. The last pass: what it makes,
    others leave alone.

    Args:
      chunk_numel: The elements of a chunk, which all calls of a chain go through before
        the next one.
      joined_numel: Leaves of at most so many elements are joined to chunks, where that
        saves more launches than it needs copies.
    """

    def batched(program: Program) -> Program:
        """Run the elementwise calls outside of the loss in chunks of many leaves."""
        graph = ir.copied(program.graph)
        _share(graph)
        forms = defaultdict[Any, list[Leaf]](list)
        for leaf in leaves_of(graph, program):
            forms[leaf.form()].append(leaf)
        groups = [leaves for leaves in forms.values() if _is_worth_it(leaves)]
        _bring_together(graph, groups)
        calls = [
            _batched(leaves, chunk_numel, min(chunk_numel, joined_numel))
            for leaves in groups
        ]
        replaced: dict[Node, Node] = {}
        for leaves, call in zip(groups, calls, strict=True):
            _replace(graph, leaves, call, replaced)
        ir.remove_dead(graph)
        ir.check_order(graph)
        return program.with_graph(graph)

    batched.__name__ = batched.__qualname__ = "batch_updates"
    return batched


# --- finding -----------------------------------------------------------------------


def _share(graph: Graph) -> None:
    """One node for equal calls outside of the loss, where nothing is recomputed."""
    results = set(ir.outputs_of(graph))
    known: dict[Any, Node] = {}
    for node in ir.calls_of(graph):
        if ir.phase(node) or not _is_function(node):
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))
        before = known.setdefault(key, node)
        # Two results of a program are two tensors.
        if before is not node and not {before, node} <= results:
            node.replace_all_uses_with(before)
            graph.erase_node(node)


def _is_function(node: Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and torch.Tag.nondeterministic_seeded not in target.tags
        and not str(target._opname).startswith(("empty", "new_empty"))
    )


def _is_worth_it(leaves: list[Leaf]) -> bool:
    """Not for one call on one small leaf."""
    numel = sum(leaf.value.numel() for leaf in leaves)
    return len(leaves) * len(leaves[0].calls) > 2 or numel >= JOINED_NUMEL


# --- replacing ---------------------------------------------------------------------


def _bring_together(graph: Graph, groups: list[list[Leaf]]) -> None:
    """Order the graph so that the members of a group follow on each other.

    A group goes where its last member was, and what needs one of its values after it;
    all else keeps its order. (Groups are of one stage, so none needs itself through
    another.)
    """
    home = {
        node: i
        for i, leaves in enumerate(groups)
        for leaf in leaves
        for node in leaf.members
    }
    units = defaultdict[Any, list[Node]](list)
    rank: dict[Any, int] = {}
    for place, node in enumerate(graph.nodes):
        unit = home.get(node, node)
        units[unit].append(node)
        rank[unit] = place
    needs: dict[Any, set[Any]] = {
        unit: {home.get(n, n) for node in nodes for n in node.all_input_nodes} - {unit}
        for unit, nodes in units.items()
    }
    needed_by = defaultdict[Any, list[Any]](list)
    for unit, others in needs.items():
        for other in others:
            needed_by[other].append(unit)
    by_rank = {place: unit for unit, place in rank.items()}
    ready = [rank[unit] for unit, others in needs.items() if not others]
    heapq.heapify(ready)
    last = next(iter(reversed(graph.nodes)))
    while ready:
        unit = by_rank[heapq.heappop(ready)]
        for node in units[unit]:
            if node is not last:
                last.prepend(node)
        for user in needed_by[unit]:
            needs[user].discard(unit)
            if not needs[user]:
                heapq.heappush(ready, rank[user])


def _batched(leaves: list[Leaf], chunk_numel: int, joined_numel: int) -> Batched:
    """The call for a group."""
    chain, sums = _chain(leaves[0])
    count = len(leaves[0].wanted)
    copies = chain.num_columns + len(chain.wholes)
    if len(chain.calls) < 2 * copies:
        joined_numel = 0
    return Batched(
        chain,
        count,
        sums,
        over=((False,) * len(leaves),) * count,
        strides=tuple(leaf.value.stride() for leaf in leaves),
        tasks=_tasks(leaves, chunk_numel, joined_numel),
        chunk_numel=chunk_numel,
    )


def _tasks(leaves: list[Leaf], chunk_numel: int, joined_numel: int) -> tuple[Task, ...]:
    """Small leaves joined, as many as fill a chunk; the others one by one."""
    tasks: list[Task] = []
    task: list[int] = []
    filled = 0
    for i, leaf in enumerate(leaves):
        numel = leaf.value.numel()
        if numel > joined_numel or not leaf.value.is_contiguous():
            tasks.append((i,))
            continue
        if filled + numel > chunk_numel:
            tasks.append(tuple(task))
            task, filled = [], 0
        task.append(i)
        filled += numel
    return tuple(tasks) + ((tuple(task),) if task else ())


def _replace(
    graph: Graph, leaves: list[Leaf], call: Batched, replaced: dict[Node, Node]
) -> None:
    """Put one call in the place of a group's members; ``replaced`` grows."""
    first = leaves[0]
    columns = [
        [replaced.get(n, n) for n in column]
        for column in zip(*(leaf.columns for leaf in leaves), strict=True)
    ]
    scalars = [replaced.get(n, n) for n in first.scalars]
    results = [leaf.wanted[j] for j in range(call.num_outputs) for leaf in leaves]
    results += [leaf.sums[k] for k in range(len(call.sums)) for leaf in leaves]
    with graph.inserting_before(min(n for leaf in leaves for n in leaf.calls)):
        node = graph.call_function(call, (*columns, *scalars))
        node.meta["val"] = [result.meta["val"] for result in results]
        for i, result in enumerate(results):
            item = graph.call_function(operator.getitem, (node, i))
            item.meta = dict(result.meta)
            result.replace_all_uses_with(item)
            replaced[result] = item
    for member in sorted((n for leaf in leaves for n in leaf.members), reverse=True):
        graph.erase_node(member)


def _chain(leaf: Leaf) -> tuple[Chain, tuple[int, ...]]:
    """The chain of a leaf, and the places of the wholes that are summed."""
    wholes = [
        Whole(leaf.calls.index(node), column)
        for node, column in zip(leaf.wanted, leaf.over, strict=True)
    ]
    sums = []
    for node in leaf.sums:
        value = leaf.calls.index(node.args[0])
        known = [j for j, whole in enumerate(wholes) if whole.value == value]
        if not known:
            wholes.append(Whole(value, None))
        sums.append(known[0] if known else len(wholes) - 1)
    chain = compiled(leaf.described(), len(leaf.columns), len(leaf.scalars), wholes)
    return chain, tuple(sums)
