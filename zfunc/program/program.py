# SPDX-License-Identifier: Apache-2.0
"""``Program``: a traced training step, and what its inputs and outputs are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from zfunc.program import comm, cost, ir, memory, text

Pass = Callable[["Program"], "Program"]


@dataclass(frozen=True, eq=False)
class Program:
    """A step as one graph; made by ``zf.jit(step).lower(state, batch)``.

    ``inputs`` and ``outputs`` are the paths of the graph's inputs and outputs
    (``params/layers/0/w``, ``batch/ids``); the last inputs are ``constants``: tensors
    that the loss closes over. ``donated`` are the paths of the inputs whose memory the
    program may write over. ``groups`` are the mesh axes that it sends along: the
    process group's name, the axis, its size.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(lambda p, x: (p * x).sum(), zf.optim.sgd(0.1))
      >>> state = zf.shard(torch.ones(4), zf.make_mesh({}))
      >>> program = zf.jit(step).lower(state, torch.ones(4))
      >>> program.inputs[:2], program.inputs[-1]
      (('step', 'params'), 'batch')
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

    def as_text(self) -> str:
        """One line per value: number, phase, shape, bytes, operator, operands.

        Inputs and outputs go by their paths, loops are indented, and values are
        numbered here, so the text is the same in every process.

        Example:
          >>> import zfunc as zf
          >>> step = zf.train_step(lambda p, x: (p * x).sum(), zf.optim.sgd(0.1))
          >>> state = zf.shard(torch.ones(4), zf.make_mesh({}))
          >>> program = zf.jit(step).lower(state, torch.ones(4))
          >>> program.as_text().splitlines()[0]
          'program for cpu'
        """
        return text.as_text(self)

    def comm_analysis(self) -> comm.CommAnalysis:
        r"""Messages, and bytes that one rank sends, by collective, axis and dtype.

        For n ranks and a full tensor of S bytes: :math:`\frac{n-1}{n} S` for a gather,
        a reduce-scatter and an all-to-all, twice that for an all-reduce. What is inside
        a loop counts as often as it runs.

        Example:
          >>> import zfunc as zf
          >>> step = zf.train_step(lambda p, x: (p * x).sum(), zf.optim.sgd(0.1))
          >>> state = zf.shard(torch.ones(4), zf.make_mesh({}))
          >>> program = zf.jit(step).lower(state, torch.ones(4))
          >>> program.comm_analysis().total_bytes
          0
        """
        return comm.comm_analysis(self)

    def memory_analysis(self) -> memory.MemoryAnalysis:
        """The peak of live bytes on one rank: how many, of what, and where.

        As the ``aten`` backend frees: each value after its last use, donated inputs
        too. Other inputs and the constants are their owner's, and stay.

        Example:
          >>> import zfunc as zf
          >>> step = zf.train_step(lambda p, x: (p * x).sum(), zf.optim.sgd(0.1))
          >>> state = zf.shard(torch.ones(4), zf.make_mesh({}))
          >>> program = zf.jit(step).lower(state, torch.ones(4))
          >>> program.memory_analysis().by_kind.params
          16
        """
        return memory.memory_analysis(self)

    def cost_analysis(self, device: cost.Device | None = None) -> cost.CostAnalysis:
        """Operations, bytes moved and sent, and the least time they take a device.

        Args:
          device: Rates to divide by; default: ``cost.H100_SXM`` for a program on GPUs,
            ``cost.CPU`` for others.

        Example:
          >>> import zfunc as zf
          >>> step = zf.train_step(lambda p, x: (p * x).sum(), zf.optim.sgd(0.1))
          >>> state = zf.shard(torch.ones(4), zf.make_mesh({}))
          >>> program = zf.jit(step).lower(state, torch.ones(4))
          >>> program.cost_analysis().total.flops
          0
        """
        return cost.cost_analysis(self, device)

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
        made = ir.copied(program.graph)
        for graph in ir.with_bodies(made):
            change(graph, program)
            ir.remove_dead(graph)
            ir.check_order(graph)
        return program.with_graph(made)

    transformed.__name__ = transformed.__qualname__ = change.__name__
    transformed.__doc__ = change.__doc__
    return transformed


def paths_by_node(program: Program) -> dict[Node, str]:
    """The path of each input node of the program."""
    return dict(zip(ir.inputs_of(program.graph), program.inputs, strict=True))
