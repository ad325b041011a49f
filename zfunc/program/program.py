# SPDX-License-Identifier: Apache-2.0
"""``Program``: a traced training step, and what its inputs and outputs are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.transforms.loop import SumOver

Pass = Callable[["Program"], "Program"]


@dataclass(frozen=True, eq=False)
class Program:
    """A step as one graph; made by ``zf.jit(step).lower(state, batch)``.

    ``inputs`` and ``outputs`` are the paths of the graph's inputs and outputs
    (``params/layers/0/w``, ``batch/ids``); the last inputs are ``constants``: tensors
    that the loss closes over. ``donated`` are the paths of the inputs whose memory the
    program may write over. ``groups`` are the mesh axes that it sends along: the
    process group's name, the axis, its size.
    """

    graph: Graph
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[torch.Tensor, ...]
    groups: tuple[tuple[str, str, int], ...]
    device_type: str
    donated: frozenset[str] = frozenset()
    out_spec: Any = dataclasses.field(default=None, repr=False)

    def with_graph(self, graph: Graph) -> Program:
        """The program with another graph of the same inputs and outputs."""
        return dataclasses.replace(self, graph=graph)

    def axis(self, group: str) -> tuple[str, int]:
        """The mesh axis, and its size, behind a process group's name."""
        return next((axis, n) for name, axis, n in self.groups if name == group)

    def kind(self, path: str) -> str:
        """What an input or output is: params, grads, moments, batch, constant, ..."""
        return path.split("/", 1)[0]

    def run_by(self, compile_graph: CompileGraph) -> Callable[[list[Any]], list[Any]]:
        """The program as a function of its inputs without the constants."""
        run, constants = compile_graph(self.graph), self.constants

        def program(args: list[Any]) -> list[Any]:
            args.extend(constants)
            return run(args)

        return program


CompileGraph = Callable[[Graph], Callable[[list[Any]], list[Any]]]


def graph_pass(change: Callable[[Graph, Program], None]) -> Pass:
    """A pass from a function that changes a graph: run on a copy, loop bodies first.

    What the change leaves unused is removed, and the order is checked.
    """

    def transformed(program: Program) -> Program:
        return program.with_graph(on_graph(program.graph, program))

    def on_graph(graph: Graph, program: Program) -> Graph:
        made = ir.copied(graph)
        for node, loop in ir.bodies(made):
            body = on_graph(loop.body, program)
            node.target = SumOver(body, loop.n, loop.num_sliced)
        change(made, program)
        ir.remove_dead(made)
        ir.check_order(made)
        return made

    transformed.__name__ = transformed.__qualname__ = change.__name__
    transformed.__doc__ = change.__doc__
    return transformed


def paths_by_node(program: Program) -> dict[Node, str]:
    """The path of each input node of the program."""
    return dict(zip(ir.inputs_of(program.graph), program.inputs, strict=True))
