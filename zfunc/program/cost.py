# SPDX-License-Identifier: Apache-2.0
"""What a program costs: operations, bytes moved, bytes sent, and the time of these.

The time is a roofline: each call takes the longer of its arithmetic and its memory
traffic, at the rates of a ``Device``. That is a lower bound for a backend that runs one
kernel per call; one that fuses moves fewer bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.fx import Node
from torch.utils.flop_counter import flop_registry

from zfunc.program import ir
from zfunc.program.comm import sent_by
from zfunc.program.listing import bytes_text, calls, count_text, op_name, sends
from zfunc.transforms.loop import SumOver

if TYPE_CHECKING:
    from zfunc.program.program import Program


@dataclass(frozen=True)
class Device:
    """The rates of one rank's device.

    Args:
      name: For people.
      flops_per_s: Of matrix products, in the dtype that the program computes in.
      memory_bytes_per_s: Of reads and writes together.
      wire_bytes_per_s: That the rank can send, one way.

    Example:
      >>> import dataclasses
      >>> slow_wire = dataclasses.replace(H100_SXM, wire_bytes_per_s=50e9)
    """

    name: str
    flops_per_s: float
    memory_bytes_per_s: float
    wire_bytes_per_s: float


# Measured: large bf16 products; a copy, its reads and writes. NVLink 4: data sheet.
H100_SXM: Final = Device("H100 SXM", 798e12, 3.0e12, 450e9)
# The data sheet's 312e12 (bf16) and 2.04e12, times the shares of theirs that the H100
# reaches (0.81, 0.90). NVLink 3: data sheet.
A100_SXM: Final = Device("A100 SXM 80GB", 252e12, 1.83e12, 300e9)
# One core of a server, float32, and gloo between two processes on it: orders of
# magnitude, for programs on CPUs to have a time at all.
CPU: Final = Device("CPU core", 50e9, 20e9, 1e9)
DEVICES: Final = MappingProxyType({"h100": H100_SXM, "a100": A100_SXM, "cpu": CPU})


@dataclass(frozen=True)
class Cost:
    """What some calls cost one rank.

    Args:
      flops: Of matrix products, convolutions and attention, a multiply-add being two.
      moved_bytes: Read from memory and written to it.
      sent_bytes: On the wire.
      compute_s: The time of the first two: the longer of them, call by call.
      comm_s: The time of the third.
    """

    flops: int = 0
    moved_bytes: int = 0
    sent_bytes: float = 0.0
    compute_s: float = 0.0
    comm_s: float = 0.0

    @property
    def serial_s(self) -> float:
        """Seconds if nothing is sent while something is computed."""
        return self.compute_s + self.comm_s

    @property
    def overlapped_s(self) -> float:
        """Seconds if everything is sent while something is computed."""
        return max(self.compute_s, self.comm_s)

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """The cost of this and, so many times, of the other."""
        return Cost(
            self.flops + times * other.flops,
            self.moved_bytes + times * other.moved_bytes,
            self.sent_bytes + times * other.sent_bytes,
            self.compute_s + times * other.compute_s,
            self.comm_s + times * other.comm_s,
        )


@dataclass(frozen=True)
class CostAnalysis:
    """What a step costs one rank; made by ``Program.cost_analysis``.

    ``forward`` and ``backward`` are of the loss, ``rest`` is what is outside of it: the
    optimizer, and gathers and reductions that are once per step.
    """

    device: Device
    forward: Cost
    backward: Cost
    rest: Cost

    @property
    def total(self) -> Cost:
        """The whole step."""
        return self.forward.plus(self.backward).plus(self.rest)

    def __str__(self) -> str:
        head = ("", "flops", "moved", "sent", "compute", "comm", "serial", "overlap")
        rows = [head]
        for name in ("forward", "backward", "rest", "total"):
            cost: Cost = getattr(self, name)
            seconds = (cost.compute_s, cost.comm_s, cost.serial_s, cost.overlapped_s)
            sizes = (bytes_text(cost.moved_bytes), bytes_text(cost.sent_bytes))
            times = [f"{1e3 * s:.3g} ms" for s in seconds]
            rows.append((name, count_text(cost.flops), *sizes, *times))  # type: ignore[arg-type]
        lines = [f"{r[0]:<9}" + "".join(f"{cell:>12}" for cell in r[1:]) for r in rows]
        return "\n".join([f"on {self.device.name}", *lines])


def cost_analysis(program: Program, device: Device | None = None) -> CostAnalysis:
    """The cost of a program, phase by phase; see ``Program``."""
    if device is None:
        device = H100_SXM if program.device_type == "cuda" else CPU
    phases = {"forward": Cost(), "backward": Cost(), "": Cost()}
    for node, times in calls(program.graph):
        phase = ir.phase(node)
        cost = _cost(node, program, device)
        phases[phase] = phases.get(phase, Cost()).plus(cost, times)
    forward, backward = phases.pop("forward"), phases.pop("backward")
    rest = Cost()
    for cost in phases.values():
        rest = rest.plus(cost)
    return CostAnalysis(device, forward, backward, rest)


def _cost(node: Node, program: Program, device: Device) -> Cost:
    if sends(node):
        sent = sent_by(node, program)
        return Cost(sent_bytes=sent, comm_s=sent / device.wire_bytes_per_s)
    flops, moved = flops_of(node), moved_bytes(node)
    seconds = max(flops / device.flops_per_s, moved / device.memory_bytes_per_s)
    return Cost(flops, moved, compute_s=seconds)


def moved_bytes(node: Node) -> int:
    """Bytes that a call reads and writes: its inputs and outputs, each once.

    Of an expanded tensor only what is in memory is read. Views, waits and messages move
    nothing (a message's time is that of the wire). Lookups count their whole table.
    """
    if isinstance(node.target, SumOver):  # what its calls move is counted with them
        return 3 * (node.target.n - 1) * ir.val_bytes(node)
    if ir.is_view(node) or sends(node) or op_name(node.target) == "wait":
        return 0
    read = 0
    for given in node.all_input_nodes:
        in_memory = sum(size for _, size in ir.storages(given))
        read += min(ir.val_bytes(given), in_memory)
    return read + ir.val_bytes(node)


def flops_of(node: Node) -> int:
    """Operations of one call: what ``torch.utils.flop_counter`` counts, and attention.

    Attention is counted in full also where it is causal, as torch's counter and PaLM's
    utilization do; a kernel that skips what is masked needs half the time. A target
    with a method ``flops(*vals)`` (the node's fake arguments) answers for itself;
    elementwise calls and reductions count 0.
    """
    target: Any = node.target
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    if not isinstance(target, torch._ops.OpOverload):
        own = getattr(target, "flops", None)
        return int(own(*args, **kwargs)) if own else 0
    if target._opname.startswith("_scaled_dot_product_"):
        return _attention_flops(target._opname, args)
    formula: Any = flop_registry.get(target._overloadpacket)
    if formula is None:
        return 0
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))


def _attention_flops(name: str, args: tuple[Any, ...]) -> int:
    r"""``2 B H T S`` times the dims that are contracted: K and V wide.

    Forward: :math:`q k^\top` and :math:`p v`. Backward, which computes p again:
    :math:`q k^\top, p^\top do, do v^\top, ds k, ds^\top q`. (torch's counter does
    not know the kernel of CPUs.)
    """
    backward = name.endswith("_backward")
    q, k, v = args[1:4] if backward else args[:3]
    *batch, length, width = q.shape
    per_width: int = 2 * math.prod(batch) * length * k.shape[-2]
    if backward:
        return per_width * (3 * int(width) + 2 * int(v.shape[-1]))
    return per_width * (int(width) + int(v.shape[-1]))
