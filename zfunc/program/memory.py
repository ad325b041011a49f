# SPDX-License-Identifier: Apache-2.0
"""How much memory a program needs: the lifetimes of its storages, added up.

Lifetimes are those of the ``aten`` backend, which lets go of a value right after its
last use. Temporaries inside a kernel, a backend's own buffers and the allocator's
rounding are not counted.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.fx import Graph, Node

from zfunc.program import ir
from zfunc.program.listing import bytes_text, numbered, op_name, sends
from zfunc.program.storages import Parts, Storages, present, storages_of
from zfunc.transforms.loop import SumOver

if TYPE_CHECKING:
    from zfunc.program.program import Program


class BytesByKind(NamedTuple):
    """Bytes by what they are for.

    ``gathered`` are parameters made whole or cast for use, ``grads`` also the pieces
    and sums on the way to a gradient, ``activations`` what the forward leaves to the
    backward.

    Example:
      >>> BytesByKind(params=4, other=1).total
      5
    """

    params: int = 0
    grads: int = 0
    moments: int = 0
    gathered: int = 0
    activations: int = 0
    batch: int = 0
    constants: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self)

    def plus(self, more: BytesByKind) -> BytesByKind:
        """The sums, kind by kind."""
        return BytesByKind(*map(operator.add, self, more))


_KINDS: Final = BytesByKind._fields


class Moment(NamedTuple):
    """The bytes alive when the value ``index`` (its number in the text) was made."""

    index: int  # type: ignore[assignment] # shadows tuple.index on purpose
    bytes: BytesByKind


@dataclass(frozen=True)
class MemoryAnalysis:
    """Live bytes over a program, of one rank; made by ``Program.memory_analysis``.

    Args:
      peak: The moment when most bytes are alive.
      place: What is computed then, for people.
      timeline: All moments in order; a loop's body once, at its costliest turn.
    """

    peak: Moment
    place: str
    timeline: tuple[Moment, ...]

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are alive at once."""
        return self.peak.bytes.total

    @property
    def by_kind(self) -> BytesByKind:
        """The bytes at the peak."""
        return self.peak.bytes

    def __str__(self) -> str:
        lines = [f"peak {bytes_text(self.peak_bytes)} at {self.place}"]
        for kind, size in zip(_KINDS, self.by_kind, strict=True):
            if size:
                lines.append(f"  {kind:<12}{bytes_text(size):>10}")
        return "\n".join(lines)


def memory_analysis(program: Program) -> MemoryAnalysis:
    """Live bytes over a program; see ``Program``."""
    graph = program.graph
    inputs, outputs = (
        [_kind(program.kind(path)) for path in paths]
        for paths in (program.inputs, program.outputs)
    )
    numbers = numbered(graph)
    pairs = zip(ir.inputs_of(graph), program.inputs, strict=True)
    kept = [node for node, path in pairs if path not in program.donated]
    replay = _Replay(numbers)
    replay.graph(graph, storages_of(graph, inputs, outputs), BytesByKind(), kept)
    timeline = tuple(replay.moments)
    peak = max(timeline, key=lambda moment: moment.bytes.total)
    nodes = {number: node for node, number in reversed(numbers.items())}
    return MemoryAnalysis(peak, _place(nodes.get(peak.index), peak.index), timeline)


def _kind(name: str) -> str:
    """The kind of an input or output: what has no row of its own is other."""
    if name == "constant":
        return "constants"
    return name if name in _KINDS else "other"


def _place(node: Node | None, index: int) -> str:
    if node is None or node.op == "placeholder":
        return "the start"
    shapes = ", ".join(map(ir.shape_text, ir.tensors_of(node)[:2]))
    phase = ir.phase(node)
    where = f" in the {phase}" if phase else ""
    return f"%{index} {op_name(node.target)} {shapes}{where}"


class _Ledger:
    """Storages that are alive: each until all that hold it have let go."""

    def __init__(self, storages: Storages) -> None:
        self._storages = storages
        self._holders: Counter[int] = Counter()
        self._bytes = dict.fromkeys(_KINDS, 0)

    def hold(self, parts: Parts) -> None:
        for key in present(parts):
            self._holders[key] += 1
            if self._holders[key] == 1:
                self._add(key, 1)

    def release(self, parts: Parts) -> None:
        for key in present(parts):
            self._holders[key] -= 1
            if self._holders[key] == 0:
                self._add(key, -1)

    def _add(self, key: int, sign: int) -> None:
        kind = self._storages.kinds[key]
        self._bytes[kind] += sign * self._storages.size_bytes[key]

    def bytes(self) -> BytesByKind:
        return BytesByKind(**self._bytes)


class _Replay:
    """Runs through programs as the aten backend does, with sizes in place of values."""

    def __init__(self, numbers: dict[Node, int]) -> None:
        self._numbers = numbers
        self.moments: list[Moment] = []

    def graph(
        self,
        graph: Graph,
        storages: Storages,
        base: BytesByKind,
        kept: Iterable[Node] = (),
    ) -> None:
        """Add the moments of a graph on top of ``base``; ``kept`` inputs stay."""
        ledger, held = _Ledger(storages), storages.held
        for node in [*ir.inputs_of(graph), *kept]:
            ledger.hold(held[node])
        for node in ir.inputs_of(graph):
            if not node.users:
                ledger.release(held[node])
            last = self._numbers[node]
        if ir.inputs_of(graph):
            self._record(last, base, ledger)
        dying, sent = ir.last_uses(graph), dict[Node, Parts]()
        for node in ir.calls_of(graph):
            if isinstance(node.target, SumOver):
                self._loop(node, storages, base.plus(ledger.bytes()))
            elif extra_bytes := getattr(node.target, "extra_bytes", None):
                given = torch.fx.map_arg(node.args, lambda n: n.meta["val"])
                inside = base.plus(BytesByKind(other=extra_bytes(*given)))
                self._record(self._numbers[node], inside, ledger)
            ledger.hold(held[node])
            if sends(node):  # the message reads its input until it is waited for
                sent[node] = sum((held[n] for n in node.all_input_nodes), ())
                ledger.hold(sent[node])
            elif op_name(node.target) == "wait":
                ledger.release(sent.pop(_started(node), ()))
            self._record(self._numbers[node], base, ledger)
            for dead in [*dying[node], *([] if node.users else [node])]:
                ledger.release(held[dead])

    def _loop(self, node: Node, storages: Storages, base: BytesByKind) -> None:
        """``sum_calls``: call after call, what they return added up."""
        loop: Any = node.target
        body, sums = storages.bodies[node], _sums(node, storages)
        first = _Ledger(body)
        for key in body.outputs:
            first.hold((key,))
        running = [first.bytes(), _added(sums)] if loop.n > 2 else [first.bytes()]
        worst = max(running, key=lambda size: size.total)
        self.graph(loop.body, body, base.plus(worst))
        totals, outs, new = first, _Ledger(body), BytesByKind()
        for key in body.outputs:
            outs.hold((key,))
        number = self._numbers[node]
        if loop.n > 2:  # in place
            self._record(number, base.plus(_added(sums)), outs)
        for key, size in zip(body.outputs, sums, strict=True):
            new = new.plus(size)
            self._record(number, base.plus(totals.bytes()).plus(new), outs)
            totals.release((key,))
            outs.release((key,))

    def _record(self, index: int, base: BytesByKind, ledger: _Ledger) -> None:
        self.moments.append(Moment(index, base.plus(ledger.bytes())))


def _started(wait: Node) -> Node:
    """The collective that a wait is for."""
    node: Any = wait.args[0]
    while node.target is operator.getitem:
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def _sums(loop: Node, storages: Storages) -> list[BytesByKind]:
    """The bytes of each of a loop's sums, which are tensors of their own."""
    return [
        BytesByKind(**{storages.kinds[key]: storages.size_bytes[key]})
        for key in present(storages.held[loop])
    ]


def _added(sizes: list[BytesByKind]) -> BytesByKind:
    total = BytesByKind()
    for size in sizes:
        total = total.plus(size)
    return total
