# SPDX-License-Identifier: Apache-2.0
"""``ListCall``: a kernel over lists of tensors, which may write over some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from zfunc.kernels.library import NAMESPACE
from zfunc.program import ir


@dataclass(frozen=True, eq=False)
class ListCall:
    """An operator of kernels whose results are lists, with all of them in one list.

    Some operators have a twin: its name has an underscore behind, its arguments are the
    same, and it writes the first of the operator's results over the lists of
    ``columns`` and returns the rest.

    Attributes:
      op: The operator.
      in_place: Its twin, or None.
      columns: The arguments that the twin writes over.
      over: Whether the twin runs.
    """

    op: Any
    in_place: Any
    columns: tuple[int, ...]
    over: bool = False

    def __repr__(self) -> str:
        return f"<{self.__name__}>"

    @property
    def __name__(self) -> str:
        chosen = self.in_place if self.over else self.op
        return f"{chosen.namespace}.{chosen._opname}"

    def __call__(self, *args: Any) -> list[torch.Tensor]:
        """The results; what is written over a tensor is that very tensor."""
        if not self.over:
            return list(_flat(self.op(*args)))
        new = self.in_place(*args)
        return [*self.leaves(args), *_flat(new)]

    def leaves(self, args: Sequence[Any]) -> list[Any]:
        """What the twin writes over, of the arguments of a call."""
        return [leaf for column in self.columns for leaf in args[column]]


def with_list_calls(graph: Graph) -> None:
    """Let the kernels of a traced graph that return lists return one list, in place.

    The analyses and passes know of one level of ``getitem``.
    """
    for node in ir.calls_of(graph):
        results: Any = node.meta.get("val")
        if getattr(node.target, "namespace", None) != NAMESPACE:
            continue
        call = list_call(node.target)
        if call.in_place is not None or _is_nested(results):
            _flatten(graph, node, results)
            node.target = call
            node.meta["val"] = list(_flat(results))


def _is_nested(results: Any) -> bool:
    return isinstance(results, (list, tuple)) and any(
        isinstance(x, (list, tuple)) for x in results
    )


def _flatten(graph: Graph, node: Node, results: Sequence[Any]) -> None:
    """Let the users of lists in the results take their tensors from one list."""
    places, place = [], 0
    for result in results:
        places.append(place)
        place += len(list(_flat(result)))
    for item in list(node.users):
        first, result = places[item.args[1]], results[item.args[1]]  # type: ignore[index]
        if isinstance(result, torch.Tensor):
            item.args = (node, first)
            continue
        for inner in list(item.users):
            inner.args = (node, first + inner.args[1])  # type: ignore[operator]
        graph.erase_node(item)


def list_call(op: Any) -> ListCall:
    """The call of an operator of kernels, by its schema and that of its twin."""
    packet = getattr(getattr(torch.ops, NAMESPACE), f"{op._opname}_", None)
    if packet is None:
        return ListCall(op, None, ())
    arguments = packet.default._schema.arguments
    columns = [i for i, x in enumerate(arguments) if _is_written(x)]
    return ListCall(op, packet.default, tuple(columns))


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _flat(results: Any) -> Iterator[Any]:
    """The tensors of lists of lists, in order."""
    if isinstance(results, torch.Tensor):
        yield results
        return
    for result in results:
        yield from _flat(result)
