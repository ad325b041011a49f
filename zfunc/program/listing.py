# SPDX-License-Identifier: Apache-2.0
"""A program as a reader sees it: its values numbered, its operators named.

Numbers and names are the same in every process, unlike the graph's own node names; the
text, the memory timeline and the tables of the other analyses share them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.transforms.loop import SumOver

# The functional collectives by what they do, written over, joined or not.
_COLLECTIVE_NAMES: Final = MappingProxyType(
    {
        "all_gather_into_tensor": "all_gather",
        "all_gather_into_tensor_out": "all_gather",
        "all_gather_into_tensor_coalesced": "all_gather",
        "reduce_scatter_tensor": "reduce_scatter",
        "reduce_scatter_tensor_coalesced": "reduce_scatter",
        "all_reduce": "all_reduce",
        "all_reduce_": "all_reduce",
        "all_reduce_coalesced": "all_reduce",
        "all_to_all_single": "all_to_all",
        "wait_tensor": "wait",
    }
)


def op_name(target: Any) -> str:
    """A short name of what a node calls: ``aten.mm``, ``all_gather``, ``wait``.

    Anything that a pass made (a function, or an object that can be called) goes by its
    ``__name__``, or else by its type's.

    Example:
      >>> op_name(torch.ops.aten.mm.default)
      'aten.mm'
      >>> op_name(torch.ops._c10d_functional.all_gather_into_tensor.default)
      'all_gather'
    """
    if isinstance(target, torch._ops.OpOverload):
        name = str(target._opname)
        if target.namespace == "_c10d_functional":
            return _COLLECTIVE_NAMES.get(name, name)
        return f"{target.namespace}.{name}"
    if target is operator.getitem:
        return "getitem"
    return str(getattr(target, "__name__", type(target).__name__))


def sends(node: Node) -> bool:
    """True for a collective of any form; its wait is not one."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "_c10d_functional"
        and op_name(target) != "wait"
    )


def calls(graph: Graph, times: int = 1) -> Iterator[tuple[Node, int]]:
    """Every call and how often it runs; the calls of a loop's body after the loop."""
    for node in ir.calls_of(graph):
        yield node, times
        if isinstance(node.target, SumOver):
            yield from calls(node.target.body, times * node.target.n)


def numbered(graph: Graph) -> dict[Node, int]:
    """A number for each value, in the order of the text: loop bodies in their place.

    The operands that a loop gives whole to its body keep their number inside it.
    """
    numbers: dict[Node, int] = {}
    _number(graph, numbers, 0)
    return numbers


def _number(graph: Graph, numbers: dict[Node, int], following: int) -> int:
    for node in graph.nodes:
        if node.op == "output" or node in numbers:
            continue
        numbers[node] = following
        following += 1
        if isinstance(node.target, SumOver):
            for given, operand in whole_operands(node, node.target):
                numbers[given] = numbers[operand]
            following = _number(node.target.body, numbers, following)
    return following


def whole_operands(node: Node, loop: SumOver) -> Iterator[tuple[Node, Node]]:
    """The inputs of a loop's body that are given whole, each with the operand."""
    inputs = ir.inputs_of(loop.body)[loop.num_sliced :]
    operands: tuple[Any, ...] = node.args[loop.num_sliced :]
    return zip(inputs, operands, strict=True)


def dtype_text(dtype: torch.dtype) -> str:
    """``f32`` for ``torch.float32``.

    Example:
      >>> dtype_text(torch.bfloat16), dtype_text(torch.int64)
      ('bf16', 'i64')
    """
    return ir.shape_text(torch.empty((), dtype=dtype, device="meta")).split("[")[0]


def bytes_text(size_bytes: float) -> str:
    """A size for people, in binary units.

    Example:
      >>> bytes_text(512), bytes_text(3 * 2**20)
      ('512 B', '3.0 MiB')
    """
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        size_bytes /= 1024
        if size_bytes < 1024:
            return f"{size_bytes:.1f} {unit}"
    return f"{size_bytes / 1024:.1f} TiB"


def count_text(count: float) -> str:
    """A count or a rate for people, in decimal units.

    Example:
      >>> count_text(798e12), count_text(12)
      ('798 T', '12')
    """
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"
