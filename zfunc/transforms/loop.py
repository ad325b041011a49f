# SPDX-License-Identifier: Apache-2.0
"""A sum over microbatches that a traced program keeps as one node, not unrolled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental import proxy_tensor

from zfunc.core.errors import TraceError

Tensors = list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class SumOver:
    r"""The node of a graph for :math:`\sum_i f(x_i, c)`; ``body`` is the graph of f.

    Operands: first the ``num_sliced`` tensors whose dim 0 is cut into ``n`` pieces,
    then those that every call is given whole.
    """

    body: torch.fx.Graph
    n: int
    num_sliced: int

    __name__ = "sum_over"

    def pieces(self, operands: Tensors, i: int) -> Tensors:
        """The operands of the i-th call."""
        sliced = operands[: self.num_sliced]
        sizes = [x.shape[0] // self.n for x in sliced]
        cut = [x.narrow(0, i * s, s) for x, s in zip(sliced, sizes, strict=True)]
        return cut + operands[self.num_sliced :]

    def __call__(self, *operands: torch.Tensor) -> Any:
        """The sums, from an interpreted body: for tests; backends compile the body."""
        module = torch.fx.GraphModule({}, self.body)
        return sum_calls(lambda xs: list(module(*xs)), self, list(operands))


def sum_calls(fn: Callable[[Tensors], Tensors], loop: SumOver, xs: Tensors) -> Tensors:
    """Call ``fn`` on each slice and add up, in order; sums are let go of as they grow.

    The second sum is a new tensor (the first result may alias an operand), later ones
    are written in place: the same bits.
    """
    totals = fn(loop.pieces(xs, 0))
    for i in range(1, loop.n):
        outs = fn(loop.pieces(xs, i))
        for k in range(len(totals)):
            if i == 1:
                totals[k] = totals[k] + outs[k]
            else:
                totals[k].add_(outs[k])
            outs[k] = totals[k]
    return totals


def is_tracing() -> bool:
    """True while ``zf.jit`` traces; then a loop is one node of the graph."""
    return proxy_tensor._CURRENT_MAKE_FX_TRACER is not None


def traced_sum(
    fn: Callable[[Tensors], Tensors], n: int, sliced: Tensors, whole: Tensors
) -> Tensors:
    """Add a ``SumOver`` node for ``fn(pieces of sliced + whole)`` to the graph."""
    mode: Any = proxy_tensor.get_proxy_mode()
    tracer: Any = proxy_tensor._CURRENT_MAKE_FX_TRACER
    with proxy_tensor.disable_proxy_modes_tracing():
        pieces = [x.narrow(0, 0, x.shape[0] // n) for x in sliced]
    body = tracer.trace_subgraph(lambda *xs: fn(list(xs)), *pieces, *whole)
    captured = lift_constants(body)
    loop = SumOver(body.graph, n, len(sliced))
    node = next(iter(reversed(body.graph.nodes)))
    with proxy_tensor.disable_proxy_modes_tracing():
        outs = [v.meta["val"] + v.meta["val"] for v in node.args[0]]
    operands = [mode.tracer.unwrap_proxy(x) for x in [*sliced, *whole]]
    proxy = mode.tracer.create_proxy("call_function", loop, (*operands, *captured), {})
    tracked: Any = proxy_tensor.track_tensor_tree(
        outs, proxy, constant=None, tracer=mode.tracer
    )
    return list(tracked)


def lift_constants(module: torch.fx.GraphModule) -> Tensors:
    """Turn tensors that a graph closes over into its last inputs; returns them.

    Raises:
      TraceError: one of them is a value of an enclosing trace, which an input it would
        not follow.
    """
    graph = module.graph
    last = [n for n in graph.nodes if n.op == "placeholder"][-1:]
    lifted: dict[str, tuple[torch.Tensor, torch.fx.Node]] = {}
    for node in [n for n in graph.nodes if n.op == "get_attr"]:
        if node.target not in lifted:
            value = getattr(module, node.target)
            if isinstance(value, torch._subclasses.FakeTensor):
                raise TraceError(
                    "a microbatch uses a tensor that was computed from the state or "
                    "the batch outside of it: compute it inside the loss."
                )
            first = next(iter(graph.nodes))
            with (
                graph.inserting_after(last[0])
                if last
                else graph.inserting_before(first)
            ):
                made = graph.placeholder(node.target)
            made.meta = dict(node.meta)
            last, lifted[node.target] = [made], (value, made)
        node.replace_all_uses_with(lifted[node.target][1])
        graph.erase_node(node)
    return [value for value, _ in lifted.values()]
