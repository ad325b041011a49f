# SPDX-License-Identifier: Apache-2.0
"""The ``inductor`` backend: pieces of the graph compiled by torch's inductor.

The graph that a step was traced to is compiled as it is: dynamo, which drops custom
backwards under ``torch.func``, has no part in it. The calls between the pieces, and
those of the pieces, are straight-line Python of the ``aten`` backend.

float32 results differ from the ``aten`` backend's in the last bits (sums in another
order, multiply-adds that round once); integers and bools are equal. In half precision
inductor rounds between fused calls less often than torch does.
"""

from __future__ import annotations

import logging
import operator
import time
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.fx import Graph, GraphModule, Node

from zfunc.program import ir
from zfunc.program.backends import aten, pieces
from zfunc.program.backends.aten import Run
from zfunc.program.backends.pieces import Piece
from zfunc.program.backends.unbatched import is_store, unbatched
from zfunc.transforms.loop import SumOver, sum_calls

logger = logging.getLogger("zfunc.inductor")

OPTIONS: Final = MappingProxyType(
    {
        # What returns to the driver is what the graph says, strides too.
        "keep_output_stride": True,
        "fallback_random": True,
        # Else (p + u).to(bfloat16).to(float32) is p + u: what was rounded off is lost.
        "emulate_precision_casts": True,
        "freezing": False,
        "triton.cudagraphs": False,
    }
)


def compile_graph(graph: Graph) -> Run:
    """A function from the list of inputs, which it empties, to the list of outputs."""
    began_s = time.perf_counter()
    compiler = Compiler()
    run = compiler.program(graph)
    logger.info(
        "compiled %d pieces, called %d times, in %.1f s",
        len(compiler.compiled),
        len(compiler.calls),
        time.perf_counter() - began_s,
    )
    return run


@dataclass
class Compiler:
    """Compiles programs; equal pieces of all of them once."""

    compiled: dict[Any, Run] = field(default_factory=dict)
    calls: list[Run] = field(default_factory=list)

    def program(self, graph: Graph) -> Run:
        """The program as a function that empties the list of its inputs."""
        graph = unbatched(graph)
        parts = pieces.parts_of(graph)
        wanted = _outputs_by_key(pieces.pieces_of(parts))
        driver = _Driver(graph)
        for part in parts:
            if isinstance(part, Node):
                driver.add(part, self._target(part))
            elif wanted[part] or part.stores:
                driver.add_piece(part, wanted[part], self._piece(part, wanted[part]))
        return aten.compile_graph(driver.finished())

    def _target(self, node: Node) -> Any:
        if isinstance(node.target, SumOver):
            return _Loop(node.target, self.program(node.target.body))
        return node.target

    def _piece(self, piece: Piece, outputs: list[Node]) -> Run:
        key = piece.key()
        if key not in self.compiled:
            run = compiled_by_inductor(piece.graph(outputs))
            columns = [piece.inputs.index(column) for column, _ in piece.stores]
            self.compiled[key] = _announced(run, columns) if columns else run
        self.calls.append(self.compiled[key])
        return self.compiled[key]


def _announced(run: Run, columns: list[int]) -> Run:
    """Count a version of the inputs that are written over, as torch's own writes do."""

    def announced(args: list[Any]) -> list[Any]:
        torch.autograd.graph.increment_version([args[i] for i in columns])
        return run(args)

    return announced


@dataclass(frozen=True, eq=False)
class _Loop:
    """A sum over microbatches whose body is compiled."""

    loop: SumOver
    run: Run

    __name__ = "compiled_sum_over"

    def __call__(self, *operands: torch.Tensor) -> list[torch.Tensor]:
        return sum_calls(self.run, self.loop, list(operands))


def _outputs_by_key(found: list[Piece]) -> dict[Piece, list[Node]]:
    """For each piece the values that it, or one that is equal, has to give."""
    alike: dict[Any, list[Piece]] = {}
    for piece in found:
        alike.setdefault(piece.key(), []).append(piece)
    wanted: dict[Piece, list[Node]] = {}
    for group in alike.values():
        given = [set(piece.outputs) for piece in group]
        union = [
            i
            for i, row in enumerate(zip(*[p.body for p in group], strict=True))
            if any(node in outs for node, outs in zip(row, given, strict=True))
        ]
        wanted |= {piece: [piece.body[i] for i in union] for piece in group}
    return wanted


class _Driver:
    """The graph between the pieces, in which a compiled piece is one call."""

    def __init__(self, program: Graph) -> None:
        self._program, self._graph = program, Graph()
        self._made: dict[Node, Node] = {
            node: self._graph.placeholder(node.name) for node in ir.inputs_of(program)
        }

    def add(self, node: Node, target: Any) -> None:
        """A call that runs as it is, with a target that takes its place."""
        made = self._made[node] = self._graph.node_copy(node, self._value)
        made.target = target

    def add_piece(self, piece: Piece, outputs: list[Node], run: Run) -> None:
        """The call of a compiled piece."""
        args = tuple(self._value(node) for node in piece.inputs)
        call = self._graph.call_function(aten.Boxed(run), args)
        used = set(piece.outputs)
        for i, node in enumerate(outputs):
            if node in used:
                self._made[node] = self._graph.call_function(
                    operator.getitem, (call, i)
                )

    def finished(self) -> Graph:
        """The whole graph, with its output."""
        outputs = [self._value(node) for node in ir.outputs_of(self._program)]
        self._graph.output(outputs)
        return self._graph

    def _value(self, node: Node) -> Node:
        """The driver's node for a value; views and items are made on first use."""
        if is_store(node):
            return self._value(node.args[0])  # type: ignore[arg-type]
        if node not in self._made:
            self._made[node] = self._graph.node_copy(node, self._value)
        return self._made[node]


def compiled_by_inductor(graph: Graph) -> Run:
    """A flat graph as inductor's function, which empties the list of its inputs."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    inner: list[Any] = []

    def compiled(module: Any, inputs: Any, **kwargs: Any) -> Any:
        function = compile_fx_inner(module, inputs, **kwargs)
        inner.append((function, len(inputs), len(ir.outputs_of(module.graph))))
        return function

    examples = [node.meta["val"] for node in ir.inputs_of(graph)]
    num_outputs = len(ir.outputs_of(graph))
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        outer: Any = compile_fx(
            GraphModule({}, graph),
            examples,
            inner_compile=compiled,
            config_patches=dict(OPTIONS),
        )
    function, *sizes = inner[0]
    if len(inner) == 1 and sizes == [len(examples), num_outputs]:
        # Without the layers around it, which restore aliases (a piece has none) and
        # count calls: 1 to 3 us of a call's 5 (CPU, 2026-11-21).
        return getattr(function, "current_callable", None) or function  # type: ignore[no-any-return]
    return lambda args: list(outer(*args))
