# SPDX-License-Identifier: Apache-2.0
"""What a program sends: bytes on the wire, counted from the shapes in its graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from zfunc.core.tree import tree_leaves
from zfunc.program import ir
from zfunc.program.listing import bytes_text, calls, dtype_text, op_name, sends

if TYPE_CHECKING:
    from zfunc.program.program import Program


@dataclass(frozen=True)
class CommRow:
    """The collectives of one kind, axis and dtype, as often as they run in a step.

    ``payload_bytes`` are those of the full tensors (what a gather results in, what a
    reduction is given); ``sent_bytes`` leave this rank.
    """

    kind: str
    axis: str
    axis_size: int
    dtype: str
    count: int
    payload_bytes: int
    sent_bytes: int


@dataclass(frozen=True)
class CommAnalysis:
    """What one rank sends in a step; made by ``Program.comm_analysis``.

    ``rows`` are in the order in which the program first sends each kind.
    """

    rows: tuple[CommRow, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes that one rank sends in a step."""
        return sum(row.sent_bytes for row in self.rows)

    @property
    def total_count(self) -> int:
        """Messages (calls of collectives) in a step."""
        return sum(row.count for row in self.rows)

    def __str__(self) -> str:
        head = f"{'collective':<16}{'axis':<14}{'dtype':<7}{'count':>7}"
        lines = [head + f"{'payload':>12}{'sent by a rank':>17}"]
        for row in self.rows:
            axis = f"{row.axis}={row.axis_size}"
            lines.append(
                f"{row.kind:<16}{axis:<14}{row.dtype:<7}{row.count:>7}"
                f"{bytes_text(row.payload_bytes):>12}{bytes_text(row.sent_bytes):>17}"
            )
        total = bytes_text(self.total_bytes)
        lines.append(f"{'total':<37}{self.total_count:>7}{'':>12}{total:>17}")
        return "\n".join(lines)


def comm_analysis(program: Program) -> CommAnalysis:
    """The collectives of a program by kind, axis and dtype; see ``Program``."""
    found: dict[tuple[str, str, int, str], tuple[int, int]] = {}
    for node, times in calls(program.graph):
        if not sends(node):
            continue
        axis, n = program.axis(ir.group_of(node))
        dtype = dtype_text(ir.tensors_of(node)[0].dtype)
        key = (op_name(node.target), axis, n, dtype)
        count, payload = found.get(key, (0, 0))
        found[key] = (count + times, payload + times * payload_bytes(node))
    rows = [
        CommRow(*key, count, payload, sent_bytes(key[0], payload, key[2]))
        for key, (count, payload) in found.items()
    ]
    return CommAnalysis(tuple(rows))


def payload_bytes(node: Node) -> int:
    """Bytes of the full tensors of one collective: the larger of its two sides."""
    given = [x for x in tree_leaves(node.args) if isinstance(x, Node)]
    return max(ir.val_bytes(node), sum(map(ir.val_bytes, given)))


def sent_bytes(kind: str, payload: int, n: int) -> int:
    r"""Bytes that each of ``n`` ranks sends for full tensors of ``payload`` bytes.

    :math:`\frac{n-1}{n} S` for a gather, a reduce-scatter and an all-to-all, which is
    what any algorithm needs; :math:`2 \frac{n-1}{n} S` for an all-reduce (the one and
    then the other), what a ring sends; rounded up to whole bytes.

    Example:
      >>> sent_bytes("all_gather", 4096, 4), sent_bytes("all_reduce", 4096, 4)
      (3072, 6144)
    """
    return -(-_passes(kind) * (n - 1) * payload // n)


def sent_by(node: Node, program: Program) -> float:
    """Bytes that a rank sends in one call of a node, unrounded; 0 for a computation."""
    if not sends(node):
        return 0.0
    n = program.axis(ir.group_of(node))[1]
    return _passes(op_name(node.target)) * (n - 1) * payload_bytes(node) / n


def _passes(kind: str) -> int:
    return 2 if kind == "all_reduce" else 1
