# SPDX-License-Identifier: Apache-2.0
"""The ``cudagraph`` backend: the compiled program recorded once and launched whole.

A step of small tensors is bound by launching its kernels. A CUDA graph launches all of
them at once, but it reads and writes fixed addresses: inputs are copied to where the
recording reads them, and results to fresh tensors, so that nothing that is kept (a
loss, a state that was not donated) changes when the next step is replayed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Graph

from zfunc.program import ir
from zfunc.program.backends import inductor
from zfunc.program.backends.aten import Run

# Libraries allocate, and Triton tunes itself, in the first calls.
NUM_WARM_UPS: Final = 3


def compile_graph(graph: Graph) -> Run:
    """A function from the list of inputs, which it empties, to the list of outputs.

    Raises:
      ValueError: the program sends to other ranks, or reads tensors that are not on
        the GPU.
    """
    _check_no_messages(graph)
    _check_on_gpu(graph)
    run = inductor.compile_graph(graph)
    recorded: list[_Recording] = []

    def replayed(args: list[Any]) -> list[Any]:
        with torch.no_grad():
            if not recorded:
                recorded.append(_record(run, args))
            return recorded[0].replay(args)

    return replayed


@dataclass(frozen=True)
class _Recording:
    """A recorded program, where it reads its inputs and leaves its outputs."""

    graph: Any
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]

    def replay(self, args: list[torch.Tensor]) -> list[torch.Tensor]:
        _fill(self.inputs, args)
        args.clear()
        self.graph.replay()
        return [_copy(x) for x in self.outputs]


def _record(run: Run, args: list[torch.Tensor]) -> _Recording:
    """Run the program on copies of its inputs until it is warm, then record it."""
    inputs = [_copy(x) for x in args]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARM_UPS):
            run(list(inputs))
            _fill(inputs, args)  # a program may write over what it is given
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(list(inputs))
    return _Recording(graph, inputs, outputs)


def _fill(held: list[torch.Tensor], given: list[torch.Tensor]) -> None:
    for mine, theirs in zip(held, given, strict=True):
        _memory(mine).copy_(_memory(theirs))


def _copy(x: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    return _memory(x).clone().as_strided(x.shape, x.stride(), 0)


def _memory(x: torch.Tensor) -> torch.Tensor:
    """The stretch of memory that a tensor's strides span: each place in it once."""
    if not x.numel():
        return x
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((last + 1,), (1,))


def _check_no_messages(graph: Graph) -> None:
    for node in itertools.chain.from_iterable(g.nodes for g in ir.with_bodies(graph)):
        if ir.is_collective(node) or node.target is ir.WAIT:
            raise ValueError(
                f"backend='cudagraph' does not record messages, and this program sends "
                f"to other ranks ({node.format_node()}): use backend='inductor'."
            )


def _check_on_gpu(graph: Graph) -> None:
    for node in ir.inputs_of(graph):
        value = node.meta["val"]
        if value.device.type != "cuda":
            raise ValueError(
                "backend='cudagraph' reads its inputs at fixed places on the GPU, and "
                f"{node.name} {ir.shape_text(value)} is on {value.device}: move the "
                "state and the batch to the GPU (make_mesh there, batch.to('cuda')), "
                "or use backend='inductor'."
            )
