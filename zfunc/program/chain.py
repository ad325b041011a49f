# SPDX-License-Identifier: Apache-2.0
"""``Chain``: elementwise calls as one generated function over a few buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from zfunc.program.elementwise import OUT, number


class Ref(NamedTuple):
    """An operand of a call: a column, an earlier value, or a 0-d tensor."""

    kind: Literal["column", "value", "scalar"]
    place: int


class Call(NamedTuple):
    """One elementwise call: ``args`` are ``Ref`` and Python values."""

    target: Any
    args: tuple[Any, ...]
    dtype: torch.dtype


class Whole(NamedTuple):
    """A value that is wanted in a buffer of the caller's.

    That buffer may be the one of ``column``, which the value may be written over.
    """

    value: int
    column: int | None


@dataclass(frozen=True, eq=False)
class Chain:
    """Calls over columns of equal length, compiled to ``run``.

    ``run`` takes the columns, a buffer for each of ``wholes``, one of each dtype in
    ``scratch``, and the 0-d tensors; all but these are 1-D and equally long.
    """

    calls: tuple[Call, ...]
    num_columns: int
    wholes: tuple[Whole, ...]
    scratch: tuple[torch.dtype, ...]
    source: str
    run: Callable[..., None]


def compiled(
    calls: Sequence[Call],
    num_columns: int,
    num_scalars: int,
    wholes: Sequence[Whole],
) -> Chain:
    """The chain of these calls, of which the values ``wholes`` are wanted.

    Example:
      >>> mul, add = torch.ops.aten.mul.Tensor, torch.ops.aten.add.Tensor
      >>> f32, x = torch.float32, Ref("column", 0)
      >>> calls = [Call(mul, (x, 2.0), f32), Call(add, (Ref("value", 0), x), f32)]
      >>> chain = compiled(calls, 1, 0, [Whole(1, 0)])
      >>> triple = torch.ones(2)
      >>> chain.run(triple, triple, torch.empty(2))
      >>> triple
      tensor([3., 3.])
    """
    rooms = _Rooms(calls, num_columns, wholes)
    names: dict[str, Any] = {}
    lines = [_line(i, call, rooms, names) for i, call in enumerate(calls)]
    lines += [f"{there}.copy_({here})" for here, there in rooms.late]
    parameters = [f"column{i}" for i in range(num_columns)]
    parameters += [f"whole{i}" for i in range(len(wholes))]
    parameters += [f"scratch{i}" for i in range(len(rooms.scratch))]
    parameters += [f"scalar{i}" for i in range(num_scalars)]
    source = "\n    ".join([f"def chain({', '.join(parameters)}):", *lines])
    exec(compile(source, "<zfunc chain>", "exec"), names)
    return Chain(
        tuple(calls),
        num_columns,
        tuple(wholes),
        tuple(rooms.scratch),
        source,
        names["chain"],
    )


def _line(i: int, call: Call, rooms: _Rooms, names: dict[str, Any]) -> str:
    """The call as source; what it names goes into ``names``."""
    parts = []
    for k, arg in enumerate(call.args):
        if isinstance(arg, Ref):
            parts.append(rooms.place(arg))
        else:
            names[f"number{i}_{k}"] = number(call.target, arg, call.dtype)
            parts.append(f"number{i}_{k}")
    names[f"call{i}"] = OUT[call.target]
    return f"call{i}({', '.join(parts)}, out={rooms.room(i)})"


class _Rooms:
    """Which buffer each value is in, chosen call by call.

    A value takes the buffer that it is wanted in; else that of an operand which nothing
    needs any more; else one in which another value is wanted later; else scratch. A
    buffer that may be a column's is written to only after the column was read last.
    """

    def __init__(
        self, calls: Sequence[Call], num_columns: int, wholes: Sequence[Whole]
    ) -> None:
        self._calls, self._wholes = calls, wholes
        self._last_read = {
            ref: i
            for i, call in enumerate(calls)
            for ref in call.args
            if isinstance(ref, Ref)
        }
        self._rooms: list[str] = []
        self._busy: dict[str, int] = {}
        self.scratch: list[torch.dtype] = []
        self.late: list[tuple[str, str]] = []
        for i in range(len(calls)):
            room = self._choose(i)
            self._rooms.append(room)
            self._busy[room] = self._end(i)
        for j, whole in enumerate(wholes):
            if self._rooms[whole.value] != f"whole{j}":
                self.late.append((self._rooms[whole.value], f"whole{j}"))

    def room(self, value: int) -> str:
        return self._rooms[value]

    def place(self, ref: Ref) -> str:
        """The name of an operand."""
        if ref.kind == "value":
            return self._rooms[ref.place]
        return f"{ref.kind}{ref.place}"

    def _choose(self, i: int) -> str:
        wanted = [j for j, whole in enumerate(self._wholes) if whole.value == i]
        if any(self._is_open(j, i) for j in wanted):
            return next(f"whole{j}" for j in wanted if self._is_open(j, i))
        if wanted:
            return self._new(i)  # a column is still read: copied at the end
        dtype, end = self._calls[i].dtype, self._end(i)
        for k, kind in enumerate(self.scratch):
            if kind == dtype and self._busy[f"scratch{k}"] <= i:
                return f"scratch{k}"
        for j, whole in enumerate(self._wholes):
            if (
                self._calls[whole.value].dtype == dtype
                and whole.value >= end
                and self._is_open(j, i)
            ):
                return f"whole{j}"
        return self._new(i)

    def _end(self, value: int) -> int:
        """The last call that needs a value; none is later if it is wanted."""
        if any(whole.value == value for whole in self._wholes):
            return len(self._calls)
        return self._last_read.get(Ref("value", value), value)

    def _is_open(self, j: int, i: int) -> bool:
        """Whether the i-th call may write to the buffer of ``wholes[j]``."""
        column = self._wholes[j].column
        read = -1 if column is None else self._last_read.get(Ref("column", column), -1)
        return read <= i and self._busy.get(f"whole{j}", -1) <= i

    def _new(self, i: int) -> str:
        self.scratch.append(self._calls[i].dtype)
        return f"scratch{len(self.scratch) - 1}"
