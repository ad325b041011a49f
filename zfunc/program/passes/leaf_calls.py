# SPDX-License-Identifier: Apache-2.0
"""The elementwise calls of a program outside of the loss, leaf by leaf."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.chain import Call, Ref
from zfunc.program.elementwise import is_elementwise
from zfunc.program.program import Program

aten: Final = torch.ops.aten


class Leaf(NamedTuple):
    """The elementwise calls of one ``stage`` on one leaf, in order.

    ``columns`` are what they read of its shape, ``scalars`` what they read of shape [].
    ``wanted`` are those that others read, ``over`` the column that each may be written
    over; ``sums`` are the calls that add up one of them.
    """

    stage: int
    calls: tuple[Node, ...]
    columns: tuple[Node, ...]
    scalars: tuple[Node, ...]
    wanted: tuple[Node, ...]
    over: tuple[int | None, ...]
    sums: tuple[Node, ...]

    @property
    def members(self) -> tuple[Node, ...]:
        """What the batched call takes the place of."""
        return self.calls + self.sums

    @property
    def value(self) -> torch.Tensor:
        """The fake value of a call; all are alike but for the dtype."""
        return self.calls[0].meta["val"]  # type: ignore[no-any-return]

    def form(self) -> Any:
        """Equal for leaves that can be batched: the same calls on the same scalars.

        In the same stage, or one group might need what another makes of it.
        """
        dtypes = tuple(n.meta["val"].dtype for n in self.columns)
        kept = tuple(map(self.calls.index, self.wanted))
        summed = tuple(self.calls.index(n.args[0]) for n in self.sums)
        where = (self.stage, self.value.device, self.scalars, dtypes)
        return (*where, tuple(self.described()), kept, self.over, summed)

    def described(self) -> list[Call]:
        """The calls, by the places of what they read."""
        places: dict[Any, Ref] = {}
        for kind, nodes in (
            ("column", self.columns),
            ("scalar", self.scalars),
            ("value", self.calls),
        ):
            places |= {n: Ref(kind, i) for i, n in enumerate(nodes)}  # type: ignore[arg-type]
        return [
            Call(
                node.target,
                tuple(places[a] if isinstance(a, Node) else a for a in node.args),
                node.meta["val"].dtype,
            )
            for node in self.calls
        ]


def leaves_of(graph: Graph, program: Program) -> Iterable[Leaf]:
    """What is connected within a stage, if all of it has the same dense strides."""
    stages = _stages(graph)
    parts = _Parts()
    for node in ir.calls_of(graph):
        if node not in stages:
            continue
        for operand in _shaped(node):
            inside = stages.get(operand) == stages[node]
            parts.join(node, operand if inside else (operand, stages[node]))
        parts.join(node, node)
    pairs = zip(ir.outputs_of(graph), program.outputs, strict=True)
    paths = defaultdict[Node, set[str]](set)
    for node, path in pairs:
        paths[node].add(path)
    given = dict(zip(ir.inputs_of(graph), program.inputs, strict=True))
    for calls in parts.of([n for n in ir.calls_of(graph) if n in stages]):
        leaf = _leaf(stages[calls[0]], calls, paths, given)
        shaped = [n.meta["val"] for n in (*leaf.calls, *leaf.columns)]
        if all(x.stride() == shaped[0].stride() for x in shaped) and _dense(shaped[0]):
            yield leaf


def _stages(graph: Graph) -> dict[Node, int]:
    """The elementwise calls outside of the loss, each with its stage.

    A stage can run as a whole: what other calls make of its values is of later stages.
    A call is of the stage in which its result is first read.
    """
    chosen = {n for n in ir.calls_of(graph) if not ir.phase(n) and is_elementwise(n)}
    early: dict[Node, int] = {}
    for node in graph.nodes:
        stages = [
            early[n] + (n in chosen and node not in chosen)
            for n in node.all_input_nodes
        ]
        early[node] = max(stages, default=0)
    late: dict[Node, int] = {}
    for node in reversed(graph.nodes):
        if node in chosen:
            bounds = [
                late[user] if user in chosen else early[user] - 1
                for user in node.users
                if user.op != "output"
            ]
            late[node] = min(bounds, default=early[node])
    return late


def _shaped(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if n.meta["val"].dim()]


def _leaf(
    stage: int,
    calls: list[Node],
    paths: dict[Node, set[str]],
    given: dict[Node, str],
) -> Leaf:
    inside = set(calls)
    read = dict.fromkeys(n for node in calls for n in node.all_input_nodes)
    outside = [n for n in read if n not in inside]
    columns = [n for n in outside if n.meta["val"].dim()]
    scalars = [n for n in outside if not n.meta["val"].dim()]
    sums = [user for node in calls for user in node.users if _is_sum(user)]
    within = inside.union(sums)
    wanted = [n for n in calls if not within.issuperset(n.users)]
    over = _may_be_over(wanted, columns, paths, given)
    return Leaf(stage, *map(tuple, (calls, columns, scalars, wanted, over, sums)))  # type: ignore[arg-type]


def _is_sum(node: Node) -> bool:
    source = node.args[0] if node.args else None
    return (
        node.target is aten.sum.default
        and len(node.args) == 1
        and not node.kwargs
        and not ir.phase(node)
        and isinstance(source, Node)
        and source.meta["val"].is_contiguous()
    )


def _may_be_over(
    wanted: list[Node],
    columns: list[Node],
    paths: dict[Node, set[str]],
    given: dict[Node, str],
) -> list[int | None]:
    """For each value the column that it may be written over, no column twice.

    That is the input of the same path, or else one that the program has made.
    """
    free = list(columns)
    over: dict[Node, Node] = {}

    def offer(fits: Callable[[Node, Node], bool]) -> None:
        for node in wanted:
            dtype = node.meta["val"].dtype
            for column in free:
                same = column.meta["val"].dtype == dtype
                if node not in over and same and fits(node, column):
                    over[node] = column
                    free.remove(column)
                    break

    offer(lambda node, column: given.get(column, "") in paths.get(node, ()))
    offer(lambda node, column: column not in given)
    return [columns.index(over[n]) if n in over else None for n in wanted]


def _dense(x: torch.Tensor) -> bool:
    """Whether the elements fill their memory, in some order of the dims."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


class _Parts:
    """Connected parts of a graph."""

    def __init__(self) -> None:
        self._above: dict[Any, Any] = {}

    def join(self, a: Any, b: Any) -> None:
        """Put two things into one part."""
        self._above[self._top(a)] = self._top(b)

    def of(self, nodes: Sequence[Node]) -> list[list[Node]]:
        """The nodes of each part, in their order."""
        parts = defaultdict[Any, list[Node]](list)
        for node in nodes:
            parts[self._top(node)].append(node)
        return list(parts.values())

    def _top(self, a: Any) -> Any:
        while (above := self._above.setdefault(a, a)) is not a and above != a:
            self._above[a] = self._above[above]
            a = above
        return a
