# SPDX-License-Identifier: Apache-2.0
"""A program as a sequence of tokens: what each call changes, sends and computes.

Sequences of programs that differ in the number of layers differ in repeated parts only,
which is what ``scaling`` looks for.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from torch._ops import OpOverload
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.comm import payload_bytes
from zfunc.program.cost import flops_of, moved_bytes
from zfunc.program.listing import calls, dtype_text, numbered, op_name, sends
from zfunc.program.memory import BytesByKind, memory_analysis
from zfunc.program.program import Program
from zfunc.transforms.loop import SumOver

# A call with more operands than this is about the whole model, such as one kernel that
# updates all parameters.
MANY_OPERANDS: Final = 12


class Wire(NamedTuple):
    """What a collective sends along: a row of the table of bytes on the wire."""

    kind: str
    axis: str
    axis_size: int
    dtype: str


class Token(NamedTuple):
    """One moment of a program.

    Attributes:
      key: What is called, on which shapes, in which phase. Only the operator where the
        call is about the whole model (``wide``), whose numbers grow with the depth.
      wide: Whether it is.
      phase: "forward", "backward" or "".
      times: How often it runs in a step.
      delta: Bytes made since the moment before, less those that were let go.
      wire: How a message is sent; None for all other calls.
      waits_for: Of the messages under way the place of the one that is waited for.
      payload_bytes: Of the full tensors, in one call.
      flops: Floating-point operations in one call.
      moved_bytes: Read from memory and written to it, in one call.
    """

    key: str
    wide: bool
    phase: str
    times: int
    delta: BytesByKind
    wire: Wire | None = None
    waits_for: int | None = None
    payload_bytes: int = 0
    flops: int = 0
    moved_bytes: int = 0

    @property
    def does_something(self) -> bool:
        """False for a view of what stays alive."""
        return bool(any(self.numbers) or self.wire or self.waits_for is not None)

    @property
    def numbers(self) -> tuple[int, ...]:
        """All that may grow with the depth, in a ``wide`` token."""
        return (*self.delta, self.payload_bytes, self.flops, self.moved_bytes)

    def with_numbers(self, numbers: tuple[int, ...]) -> Token:
        """The token with other numbers, in the order of ``numbers``."""
        *delta, payload_bytes, flops, moved_bytes = numbers
        return self._replace(
            delta=BytesByKind(*delta),
            payload_bytes=payload_bytes,
            flops=flops,
            moved_bytes=moved_bytes,
        )


def record(program: Program) -> list[Token]:
    """The moments of a program, in order."""
    graph = program.graph
    nodes = {number: node for node, number in reversed(numbered(graph).items())}
    times = dict(calls(graph))
    ends = {node for one in ir.with_bodies(graph) for node in _ends_of_wide(one)}
    slots = {n: i for one in ir.with_bodies(graph) for n, i in _slots_of_waits(one)}
    tokens: list[Token] = []
    before, previous = BytesByKind(), None
    seen: Counter[int] = Counter()
    for moment in memory_analysis(program).timeline:
        node = nodes[moment.index]
        seen[moment.index] += 1
        first = seen[moment.index] == 1
        after_wide = previous in ends and node is not previous
        wide = _is_wide(node, seen[moment.index]) or after_wide
        delta = BytesByKind(*map(operator.sub, moment.bytes, before))
        key, count = _key(node, wide), times.get(node, 1)
        token = Token(key, wide, ir.phase(node), count, delta)
        if first and node.op == "call_function":
            token = _with_work(token._replace(waits_for=slots.get(node)), node, program)
        if wide or token.does_something:
            tokens.append(token)
        before, previous = moment.bytes, node
    return tokens


def _slots_of_waits(graph: Graph) -> Iterator[tuple[Node, int]]:
    """Each wait, and which of the messages under way it is for."""
    under_way: list[Node] = []
    for node in ir.calls_of(graph):
        if sends(node):
            under_way.append(node)
        elif op_name(node.target) == "wait":
            start: Any = node.all_input_nodes[0]
            while start.target is operator.getitem:
                start = start.args[0]
            if start in under_way:  # one message may have several results
                yield node, under_way.index(start)
                under_way.remove(start)


def _is_wide(node: Node, turn: int) -> bool:
    """Whether the ``turn``-th moment of a node is about the whole model."""
    if isinstance(node.target, SumOver):  # after the last turn; the sums, one by one
        return turn < 3
    # A body begins with a moment that has the number of one of the loop's operands.
    return node.op == "placeholder" or turn > 1 or _is_whole_model(node)


def _is_whole_model(node: Node) -> bool:
    """A loop, a call that a pass made of many, or one of many operands."""
    made = node.op == "call_function" and not (
        isinstance(node.target, OpOverload) or node.target is operator.getitem
    )
    return made or len(node.all_input_nodes) > MANY_OPERANDS


def _ends_of_wide(graph: Graph) -> Iterator[Node]:
    """The nodes after which what the whole model held is let go."""
    for node, dying in ir.last_uses(graph).items():
        if len(dying) > MANY_OPERANDS or any(map(_is_whole_model, [node, *dying])):
            yield node


def _key(node: Node, wide: bool) -> str:
    name = op_name(node.target) if node.op == "call_function" else node.op
    if wide or isinstance(node.target, SumOver):
        return name
    shapes = " ".join(map(ir.shape_text, ir.tensors_of(node)))
    if name == "getitem":
        return f"{name} {shapes}"
    given = [ir.shape_text(x) for n in node.all_input_nodes for x in ir.tensors_of(n)]
    return f"{name} {ir.phase(node) or 'step'} {' '.join(given)} -> {shapes}"


def _with_work(token: Token, node: Node, program: Program) -> Token:
    if not sends(node):
        return token._replace(flops=flops_of(node), moved_bytes=moved_bytes(node))
    axis, n = program.axis(ir.group_of(node))
    dtype = dtype_text(ir.tensors_of(node)[0].dtype)
    wire = Wire(op_name(node.target), axis, n, dtype)
    return token._replace(wire=wire, payload_bytes=payload_bytes(node))
