# SPDX-License-Identifier: Apache-2.0
"""The ``aten`` backend: the graph as straight-line Python over aten operators.

No compile time. A value is let go of right after its last use, which is what the memory
analysis counts.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.transforms.loop import SumOver, sum_calls

aten: Final = torch.ops.aten
# The same kernels through torch's own bindings, which cost 0.6 us less a call than
# torch.ops (CPU, 2026-11-21).
BINDINGS: Final = MappingProxyType(
    {
        aten.mm.default: torch.mm,
        aten.bmm.default: torch.bmm,
        aten.addmm.default: torch.addmm,
        aten.add.Tensor: torch.add,
        aten.sub.Tensor: torch.sub,
        aten.mul.Tensor: torch.mul,
        aten.mul.Scalar: torch.mul,
        aten.div.Tensor: torch.div,
        aten.div.Scalar: torch.div,
        aten.neg.default: torch.neg,
        aten.sqrt.default: torch.sqrt,
        aten.rsqrt.default: torch.rsqrt,
        aten.pow.Tensor_Scalar: torch.pow,
        aten.view.default: torch.Tensor.view,
        aten.t.default: torch.t,
        aten.transpose.int: torch.transpose,
        aten.permute.default: torch.permute,
        aten.unsqueeze.default: torch.unsqueeze,
        aten.squeeze.dim: torch.squeeze,
        aten.expand.default: torch.Tensor.expand,
        aten.select.int: torch.select,
        aten.split_with_sizes.default: torch.split_with_sizes,
        aten.cat.default: torch.cat,
        aten.sum.default: torch.sum,
        aten.sum.dim_IntList: torch.sum,
        aten.mean.dim: torch.mean,
        aten.where.self: torch.where,
        aten.exp.default: torch.exp,
        aten.embedding.default: torch.embedding,
    }
)

Run = Callable[[list[Any]], list[Any]]


def _all_gather(x: torch.Tensor, n: int, group: str) -> torch.Tensor:
    """All-gather into a tensor that is made here.

    The functional operator makes it in C++. With several messages under way, Python is
    given it while a thread of gloo counts references to it, and the heap is corrupted:
    tests/distributed/test_many_messages.py (torch 2.13, 2026-11-21).
    """
    out = x.new_empty((n * x.shape[0], *x.shape[1:]))
    gather = torch.ops._c10d_functional.all_gather_into_tensor_out
    return gather(x, n, group, out=out)  # type: ignore[no-any-return]


def _all_reduce(x: torch.Tensor, operation: str, group: str) -> torch.Tensor:
    """All-reduce in a copy that is made here; see ``_all_gather``."""
    reduce = torch.ops._c10d_functional.all_reduce_
    return reduce(x.clone(), operation, group)  # type: ignore[no-any-return]


_ON_CPU: Final = MappingProxyType(
    {ir.ALL_GATHER: _all_gather, ir.ALL_REDUCE: _all_reduce}
)


@dataclass(frozen=True, eq=False)
class Boxed:
    """A call that is given its operands as a list, which it empties as it goes.

    So an operand that nothing else needs is let go of inside of the call.
    """

    run: Run

    __name__ = "boxed"

    def __call__(self, *operands: Any) -> Any:
        """The results, for interpreters; programs call ``run``."""
        return self.run(list(operands))


def compile_graph(graph: Graph) -> Run:
    """A function from the list of inputs, which it empties, to the list of outputs.

    It empties the list as it goes: None is in the place of what it has let go of.
    """
    writer = _Writer()
    source = writer.source(graph)
    names = dict(writer.names)
    exec(compile(source, "<zfunc program>", "exec"), names)
    body: Run = names["program"]

    def run(args: list[Any]) -> list[Any]:
        with torch.no_grad():
            return body(args)

    return run


class _Writer:
    """Python source for a graph, and the objects that it names."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self._known: dict[int, str] = {}

    def source(self, graph: Graph) -> str:
        lines = ["def program(args):"]
        places = {n: i for i, n in enumerate(ir.inputs_of(graph))}
        if places:
            lines.append(f"({', '.join(n.name for n in places)},) = args")
        dying = ir.last_uses(graph)
        used = {n for node in dying for n in dying[node]}
        lines += _let_go([n for n in places if n not in used], places)
        for node in ir.calls_of(graph):
            dead = dying[node] + ([] if node.users else [node])
            if isinstance(node.target, Boxed):
                lines.append(f"operands = {self.value(node.args)}")
                lines += _let_go(dying[node], places)
                lines.append(f"{node.name} = {self.named(node.target.run)}(operands)")
                dead = dead[len(dying[node]) :]
            else:
                lines.append(f"{node.name} = {self.call(node)}")
            lines += _let_go(dead, places)
        outputs = [self.value(n) for n in ir.outputs_of(graph)]
        lines += ["args.clear()", f"return [{', '.join(outputs)}]"]
        return "\n    ".join(lines)

    def call(self, node: Node) -> str:
        target: Any = node.target
        if target is operator.getitem:
            return f"{self.value(node.args[0])}[{node.args[1]}]"
        if isinstance(target, SumOver):
            body, operands = compile_graph(target.body), self.value(list(node.args))
            fn, loop = self.named(sum_calls), self.named(target)
            return f"{fn}({self.named(body)}, {loop}, {operands})"
        fast = BINDINGS.get(target, getattr(target, "_op", target))
        if target in _ON_CPU and ir.tensors_of(node)[0].device.type == "cpu":
            fast = _ON_CPU[target]
        parts = [self.value(a) for a in node.args]
        parts += [f"{key}={self.value(v)}" for key, v in node.kwargs.items()]
        return f"{self.named(fast)}({', '.join(parts)})"

    def value(self, x: Any) -> str:
        match x:
            case Node():
                return x.name
            case list() | tuple():
                inner = ", ".join(map(self.value, x))
                return f"[{inner}]"
            case bool() | int() | str() | None:
                return repr(x)
            case float() if x == x and abs(x) != float("inf"):
                return repr(x)
        return self.named(x)

    def named(self, thing: Any) -> str:
        key = id(thing)
        if key not in self._known:
            self._known[key] = f"c{len(self._known)}_"
            self.names[self._known[key]] = thing  # which keeps its id its own
        return self._known[key]


def _let_go(nodes: list[Node], places: dict[Node, int]) -> list[str]:
    """Source that forgets values, and marks those of the arguments that are among them.

    So whoever called a program that raises sees what it has not let go of.
    """
    lines = [f"del {', '.join(n.name for n in nodes)}"] if nodes else []
    given = [f"args[{places[n]}]" for n in nodes if n in places]
    return lines + ([f"{' = '.join(given)} = None"] if given else [])
