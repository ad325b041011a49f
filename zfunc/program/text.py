# SPDX-License-Identifier: Apache-2.0
"""A program as text: one line per value, with shapes, bytes and the leaves' paths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.comm import comm_analysis
from zfunc.program.listing import bytes_text, calls, numbered, op_name, sends
from zfunc.transforms.loop import SumOver

if TYPE_CHECKING:
    from zfunc.program.program import Program

_MARKS: Final = (("forward", "F"), ("backward", "B"))


def as_text(program: Program) -> str:
    """The program as text; see ``Program``."""
    return "\n".join([*_Printer(program).lines(), ""])


class _Printer:
    """Lines for the nodes of a program."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._numbers = numbered(program.graph)

    def lines(self) -> Iterator[str]:
        program = self._program
        yield from self._header()
        yield "inputs"
        given = ir.inputs_of(program.graph)
        for node, path in zip(given, program.inputs, strict=True):
            donated = "  (donated)" if path in program.donated else ""
            yield self._line(node, path + donated, "")
        yield "calls (F: forward, B: backward)"
        yield from self._calls(program.graph, "")
        yield "outputs"
        results = ir.outputs_of(program.graph)
        for node, path in zip(results, program.outputs, strict=True):
            yield f"  {path} = {self._value(node)}"

    def _header(self) -> Iterator[str]:
        program = self._program
        axes = dict.fromkeys(f"{axis}={n}" for _, axis, n in program.groups)
        mesh = f", mesh {' '.join(axes)}" if axes else ""
        yield f"program for {program.device_type}{mesh}"
        given = sum(map(ir.val_bytes, ir.inputs_of(program.graph)))
        results = sum(map(ir.val_bytes, ir.outputs_of(program.graph)))
        yield f"  {len(program.inputs)} inputs: {bytes_text(given)}"
        yield f"  {len(program.outputs)} outputs: {bytes_text(results)}"
        yield f"  {sum(1 for _ in calls(program.graph))} calls"
        comm = comm_analysis(program)
        sent = bytes_text(comm.total_bytes)
        yield f"  {comm.total_count} collectives: {sent} sent by a rank"

    def _calls(self, graph: Graph, indent: str) -> Iterator[str]:
        for node in ir.calls_of(graph):
            if isinstance(node.target, SumOver):
                yield from self._loop(node, node.target, indent)
            else:
                yield self._line(node, self._call(node), indent)

    def _loop(self, node: Node, loop: SumOver, indent: str) -> Iterator[str]:
        yield self._line(node, f"sum of {loop.n} calls:", indent)
        inner, inputs = indent + "  ", ir.inputs_of(loop.body)
        for given, operand in zip(inputs, node.args[: loop.num_sliced], strict=False):
            cut = f"piece of {self._value(operand)}, one of {loop.n} along dim 0"
            yield self._line(given, cut, inner)
        yield from self._calls(loop.body, inner)
        results = ", ".join(map(self._value, ir.outputs_of(loop.body)))
        yield f"  {inner}return {results}"

    def _line(self, node: Node, text: str, indent: str) -> str:
        shapes = [ir.shape_text(x) for x in ir.tensors_of(node)]
        if len(shapes) > 2:
            shapes = [f"{len(shapes)} tensors"]
        size = "view" if _only_looks(node) else bytes_text(ir.val_bytes(node))
        mark = dict(_MARKS).get(ir.phase(node), " ")
        number = f"%{self._numbers[node]}"
        return f"  {indent}{number:<5} {mark} {', '.join(shapes):<16} {size:>9}  {text}"

    def _call(self, node: Node) -> str:
        name = op_name(node.target)
        if name == "getitem":
            return f"{self._value(node.args[0])}[{node.args[1]}]"
        args: Any = node.args
        if sends(node):
            axis = self._program.axis(ir.group_of(node))[0]
            args = [node.args[0]]
            return f"{name}({self._list(args)}, over {axis!r})"
        return f"{name}({self._list(args)})"

    def _list(self, values: Any) -> str:
        return ", ".join(map(self._value, values))

    def _value(self, x: Any) -> str:
        """An argument, without addresses: text is compared across processes."""
        match x:
            case Node():
                return f"%{self._numbers[x]}"
            case list() | tuple():
                return f"[{self._list(x)}]"
            case bool() | int() | float() | str() | None | torch.dtype():
                return str(x).removeprefix("torch.")
        return str(getattr(x, "__name__", type(x).__name__))


def _only_looks(node: Node) -> bool:
    """True for what takes no memory of its own."""
    return node.op == "call_function" and (
        ir.is_view(node) or op_name(node.target) == "wait"
    )
