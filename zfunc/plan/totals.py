# SPDX-License-Identifier: Apache-2.0
"""Sums over a sequence of tokens: the peak, the bytes on the wire, the time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from zfunc.plan.recording import Token, Wire
from zfunc.program.comm import CommRow, sent_bytes
from zfunc.program.cost import Device
from zfunc.program.memory import BytesByKind


class Peak(NamedTuple):
    """The moment when most bytes are alive: its place in the sequence, the bytes."""

    place: int
    bytes: BytesByKind


def live_bytes(tokens: Sequence[Token]) -> Iterator[BytesByKind]:
    """The bytes alive at each token."""
    alive = BytesByKind()
    for token in tokens:
        alive = alive.plus(token.delta)
        yield alive


def peak_of(tokens: Sequence[Token]) -> Peak:
    """The first moment when most bytes are alive."""
    moments = enumerate(live_bytes(tokens))
    return Peak(*max(moments, key=lambda moment: moment[1].total))


def comm_rows(tokens: Sequence[Token]) -> tuple[CommRow, ...]:
    """The collectives by kind, axis and dtype, as in ``Program.comm_analysis``."""
    found: dict[Wire, tuple[int, int]] = {}
    for token in tokens:
        if token.wire is not None:
            count, payload = found.get(token.wire, (0, 0))
            payload += token.times * token.payload_bytes
            found[token.wire] = (count + token.times, payload)
    return tuple(
        CommRow(*wire, count, payload, sent_bytes(wire.kind, payload, wire.axis_size))
        for wire, (count, payload) in found.items()
    )


class Seconds(NamedTuple):
    """Estimated times of a step.

    Attributes:
      compute: Of all arithmetic and memory traffic, at the device's rates.
      comm: Of all messages, one after the other.
      step: Of both, each message under way from where the program starts it to where
        it waits for it. At least the longer of the two, at most their sum.
    """

    compute: float
    comm: float
    step: float


def seconds_of(tokens: Sequence[Token], device: Device) -> Seconds:
    """A roofline of the computation beside one wire: without latencies, so too low."""
    now = free = compute = comm = 0.0  # the two streams' clocks, and their work
    arrivals: list[float] = []
    for times, group in itertools.groupby(tokens, key=lambda token: token.times):
        if times > 1:  # the turns of a loop; what a turn sends arrives before its end
            turn = seconds_of([token._replace(times=1) for token in group], device)
            now += times * turn.step
            compute, comm = compute + times * turn.compute, comm + times * turn.comm
            continue
        for token in group:
            if token.wire is not None:
                sent = sent_bytes(
                    token.wire.kind, token.payload_bytes, token.wire.axis_size
                )
                comm += sent / device.wire_bytes_per_s
                free = max(now, free) + sent / device.wire_bytes_per_s
                arrivals.append(free)
            elif token.waits_for is not None:
                now = max(now, arrivals.pop(token.waits_for))
            else:
                work = _work_s(token, device)
                now, compute = now + work, compute + work
    return Seconds(compute, comm, max(now, free))


def _work_s(token: Token, device: Device) -> float:
    return max(
        token.flops / device.flops_per_s, token.moved_bytes / device.memory_bytes_per_s
    )
