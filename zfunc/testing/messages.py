# SPDX-License-Identifier: Apache-2.0
"""The programs of all ranks run together in one process, message by message.

Each rank runs its graph in order, and what a message brings is garbage until it is
waited for. A rank stops at each message until those it is for are at it too, as if
nothing were buffered: a run that ends proves that this order cannot deadlock.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from zfunc.core.errors import ZfuncError
from zfunc.core.tree import tree_leaves
from zfunc.core.wire import fold_add
from zfunc.program import ir
from zfunc.program.program import Program
from zfunc.transforms.loop import SumOver

Tensors = list[torch.Tensor]


class LockstepError(ZfuncError, AssertionError):
    """Programs that do not fit together, or one that uses a message too early.

    Example:
      >>> raise LockstepError("rank 0 waits for an all_reduce, rank 1 has returned")
      Traceback (most recent call last):
      zfunc.testing.messages.LockstepError: rank 0 waits for an all_reduce, rank 1 ...
    """


# --- one rank ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Message:
    """What a rank is at: ``place`` is where it is in its program, for people."""

    node: Node
    place: str
    sent: torch.Tensor

    @property
    def op(self) -> str:
        return str(self.node.target._opname)  # type: ignore[union-attr]

    @property
    def group(self) -> str:
        return ir.group_of(self.node)

    def kind(self) -> tuple[Any, ...]:
        """What all ranks have to agree on; the splits of an all_to_all are pairwise."""
        rest = () if self.node.target is ir.ALL_TO_ALL else self.node.args[1:-1]
        shape = () if self.node.target is ir.ALL_TO_ALL else tuple(self.sent.shape)
        return self.node.target, self.sent.dtype, shape, rest

    def __str__(self) -> str:
        return f"{self.op}({ir.shape_text(self.sent)}) along {self.group!r}"


@dataclass(frozen=True)
class _Pending:
    """A message under way: its result is in ``out`` only after the wait."""

    message: _Message
    out: torch.Tensor
    result: torch.Tensor
    sent: torch.Tensor
    versions: tuple[int, int]


Run = Generator[_Message, torch.Tensor, Tensors]


class _Rank:
    """An interpreter that stops at every message; see ``run``."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._pending: dict[int, _Pending] = {}

    def run(self, graph: Graph, args: Tensors, where: str = "") -> Run:
        """Run the graph; yields what it sends, is sent what it receives."""
        values: dict[Node, Any] = {}
        waiting = iter(args)
        dying = ir.last_uses(graph)
        for i, node in enumerate(graph.nodes):
            if node.op == "placeholder":
                values[node] = next(waiting)
                continue
            place = f"{where}node {i} ({node.name})"
            self._check_there(node, values, place)
            call = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                self._check_none_lost(graph, place)
                return list(call[0][0])
            values[node] = yield from self._call(node, *call, place)
            for dead in dying[node]:
                del values[dead]
        raise AssertionError("a graph ends with its output")

    def _call(
        self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], place: str
    ) -> Generator[_Message, torch.Tensor, Any]:
        if node.target is ir.WAIT:
            return self._wait(args[0], place)
        if isinstance(node.target, SumOver):
            return (yield from self._loop(node.target, list(args), place))
        if ir.is_collective(node):
            message = _Message(node, place, args[0])
            return self._start(message, (yield message))
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _loop(self, loop: SumOver, operands: Tensors, place: str) -> Run:
        """As ``sum_calls``, one microbatch after the other."""
        totals: Tensors = []
        for i in range(loop.n):
            where = f"{place}, microbatch {i}, "
            outs = yield from self.run(loop.body, loop.pieces(operands, i), where)
            totals = [a + b for a, b in zip(totals, outs, strict=True)] if i else outs
        return totals

    def _start(self, message: _Message, result: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(result)
        _bytes(out).fill_(0xFF)  # NaN, or -1
        versions = (message.sent._version, out._version)
        copy = message.sent.clone()
        found = _Pending(message, out, result, copy, versions)
        self._pending[_storage(out)] = found
        return out

    def _wait(self, out: torch.Tensor, place: str) -> torch.Tensor:
        found = self._pending.pop(_storage(out), None)
        if found is None:
            raise LockstepError(
                f"rank {self.rank}, {place}: waits for a tensor that is not under way."
            )
        message = found.message
        now = (message.sent._version, found.out._version)
        if now != found.versions or not _same_bits(message.sent, found.sent):
            what = "input" if now[1] == found.versions[1] else "result"
            raise LockstepError(
                f"rank {self.rank}, {place}: the {what} of {message}, started at "
                f"{message.place}, was written to while the message was under way."
            )
        found.out.copy_(found.result)
        return out

    def _check_there(self, node: Node, values: dict[Node, Any], place: str) -> None:
        """Raise if an input has been let go of, or is read while it is under way."""
        gone = [n.name for n in node.all_input_nodes if n not in values]
        if gone:
            raise LockstepError(
                f"rank {self.rank}, {place}: uses {gone[0]}, which was let go of."
            )
        if not (ir.is_view(node) or node.target is ir.WAIT):
            self._check_received([values[n] for n in node.all_input_nodes], place)

    def _check_none_lost(self, graph: Graph, place: str) -> None:
        for found in self._pending.values():
            if found.message.node.graph is graph:
                raise LockstepError(
                    f"rank {self.rank}, {place}: never waits for {found.message}, "
                    f"started at {found.message.place}."
                )

    def _check_received(self, values: list[Any], place: str) -> None:
        """Raise if one of the values has not been waited for."""
        for x in tree_leaves(values):
            found = isinstance(x, torch.Tensor) and self._pending.get(_storage(x))
            if found:
                raise LockstepError(
                    f"rank {self.rank}, {place}: uses the result of {found.message}, "
                    f"started at {found.message.place}, before waiting for it."
                )


def _storage(x: torch.Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().flatten().view(torch.uint8)


# --- all ranks ---------------------------------------------------------------------


def run_lockstep(
    programs: Sequence[Program], args: Sequence[Sequence[torch.Tensor]]
) -> list[Tensors]:
    """Run one program per rank together; the outputs of each.

    ``args`` are those of each program without its constants; they are copied, so that a
    program may write over what it is given. Ranks are in the order of the mesh. Sums
    are added up along a tree, as ``simulate`` and gloo have it.

    Raises:
      LockstepError: ranks that are at different messages, or one that has returned
        while others wait for it: a job would hang there, or mix up its messages. Also
        a result that is used before its wait, is never waited for, or is written to.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(
      ...     lambda p, b: (p * b).sum(), zf.optim.sgd(1.0), zf.partition(zero=3)
      ... )
      >>> from zfunc.testing import lockstep
      >>> two = lockstep(step, {"data": 2})
      >>> state, batch = two.shard(torch.ones(2)), torch.ones(2, 2)
      >>> programs = two.lower(state, batch)
      >>> outputs = run_lockstep(programs, two.arguments(state, batch))
      >>> programs[0].outputs[1], outputs[0][1], outputs[1][1]
      ('params', tensor([0.]), tensor([0.]))
    """
    n = math.prod(size for _, _, size in programs[0].groups)
    if not len(programs) == len(args) == n:
        raise ValueError(
            f"the programs send along {programs[0].groups}: that is one for each of "
            f"{n} ranks; got {len(programs)} programs and arguments for {len(args)}."
        )
    states = []
    for rank, (program, mine) in enumerate(zip(programs, args, strict=True)):
        inputs = [x.clone() for x in [*mine, *program.constants]]
        states.append(_Rank(rank).run(program.graph, inputs))
    with torch.no_grad():
        return _Meeting(programs, states).run()


class _Meeting:
    """The ranks, each at a message or done."""

    def __init__(self, programs: Sequence[Program], runs: list[Run]) -> None:
        self.programs, self.runs = programs, runs
        self.at: dict[int, _Message] = {}
        self.done: dict[int, Tensors] = {}

    def run(self) -> list[Tensors]:
        for rank in range(len(self.runs)):
            self._go_on(rank, None)
        while len(self.done) < len(self.runs):
            ready = next(filter(self._all_there, map(self._partners, self.at)), None)
            if ready is None:
                raise self._error("wait for each other")
            self._meet(ready)
        return [self.done[rank] for rank in range(len(self.runs))]

    def _go_on(self, rank: int, received: Any) -> None:
        self.at.pop(rank, None)
        try:
            self.at[rank] = self.runs[rank].send(received)
        except StopIteration as end:
            self.done[rank] = end.value

    def _partners(self, rank: int) -> list[int]:
        """The ranks that a rank's message is for, in the order of the axis."""
        groups = self.programs[rank].groups
        names, sizes = [g[0] for g in groups], [g[2] for g in groups]
        position = names.index(self.at[rank].group)
        grid = torch.arange(math.prod(sizes)).view(sizes)
        lines = grid.movedim(position, -1).reshape(-1, sizes[position]).tolist()
        return next(line for line in lines if rank in line)

    def _all_there(self, ranks: list[int]) -> bool:
        """Whether these ranks are at one message; raises if some never will be."""
        if any(r in self.done for r in ranks):
            raise self._error("wait for a rank that has returned", ranks)
        group = self.at[ranks[0]].group
        return all(self.at[r].group == group for r in ranks)

    def _meet(self, ranks: list[int]) -> None:
        messages = [self.at[r] for r in ranks]
        same = {m.kind() for m in messages}
        if len(same) > 1 or len({m.place for m in messages}) > 1:
            raise self._error("are at different messages", ranks)
        received = _results(messages)
        if received is None:
            raise self._error("expect pieces of other sizes than are sent", ranks)
        for rank, result in zip(ranks, received, strict=True):
            self._go_on(rank, result)

    def _error(self, what: str, ranks: Sequence[int] | None = None) -> LockstepError:
        everyone = range(len(self.runs)) if ranks is None else ranks
        lines = [
            f"  rank {r}: "
            + (f"{self.at[r]} at {self.at[r].place}" if r in self.at else "returned")
            for r in everyone
        ]
        named = ", ".join(map(str, everyone))
        return LockstepError(f"ranks {named} {what}:\n" + "\n".join(lines))


def _results(messages: list[_Message]) -> Tensors | None:
    """What each rank receives; None where the pieces do not fit."""
    sent, node = [m.sent for m in messages], messages[0].node
    n = len(sent)
    match node.target:
        case ir.ALL_GATHER:
            return [torch.cat(sent) for _ in sent]
        case ir.ALL_TO_ALL:
            return _exchanged(messages)
        case _ if node.args[1] != "sum":
            raise NotImplementedError(f"{messages[0]} reduces by {node.args[1]!r}")
        case ir.ALL_REDUCE:
            return [fold_add(sent).clone() for _ in sent]
    return [part.clone() for part in fold_add(sent).chunk(n)]


def _exchanged(messages: list[_Message]) -> Tensors | None:
    """The j-th piece of rank i as the i-th piece of rank j."""
    receive = [list(m.node.args[1]) for m in messages]  # type: ignore[arg-type]
    send = [list(m.node.args[2]) for m in messages]  # type: ignore[arg-type]
    if receive != [list(sizes) for sizes in zip(*send, strict=True)]:
        return None
    pieces = [m.sent.split(sizes) for m, sizes in zip(messages, send, strict=True)]
    return [torch.cat(column) for column in zip(*pieces, strict=True)]
