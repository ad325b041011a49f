# SPDX-License-Identifier: Apache-2.0
"""What one rank needs for a step: memory, bytes on the wire, operations, time."""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Final

from zfunc.core.tree import tree_leaves
from zfunc.plan.errors import PlanError
from zfunc.plan.models import Model, load
from zfunc.plan.recording import Token, record
from zfunc.plan.request import Request
from zfunc.plan.scaling import scaled
from zfunc.plan.tracing import Zero, lower
from zfunc.program.comm import sent_bytes
from zfunc.program.cost import DEVICES, Device
from zfunc.program.memory import BytesByKind
from zfunc.program.program import Pass

# Deeper models are put together from programs of these depths.
_DEPTHS: Final = (2, 3)


@dataclass(frozen=True)
class Stage:
    """The plan of one stage of ZeRO, for each rank.

    Args:
      zero: The stage.
      num_params: Of the whole model.
      model_states_bytes: Stored parameters and moments, the weights that are held
        through the step (at the end of the forward; none at stage 3, which holds them
        from use to use) and gradients (at the end of the backward): what the ZeRO paper
        counts, without activations and buffers.
      peak: Most live bytes at once, by kind.
      peak_at: What is computed then.
      sent_bytes: On the wire in a step, by collective and dtype.
      flops: Of matrix products and attention.
      moved_bytes: Through memory.
      compute_s: Roofline time of the device for them.
      comm_s: Time of the wire for what is sent.
      timeline: Live bytes by kind, moment by moment.
    """

    zero: int
    num_params: int
    model_states_bytes: int
    peak: BytesByKind
    peak_at: str
    sent_bytes: dict[str, int]
    flops: int
    moved_bytes: int
    compute_s: float
    comm_s: float
    timeline: tuple[BytesByKind, ...]

    @property
    def peak_bytes(self) -> int:
        """Most live bytes at once."""
        return sum(self.peak)

    @property
    def total_sent_bytes(self) -> int:
        """Bytes on the wire in a step."""
        return sum(self.sent_bytes.values())


def plan(
    request: Request, zero: Zero, *, chosen: tuple[Pass, ...] | None = None
) -> Stage:
    """Trace the step of a request at one stage and read off what a rank needs.

    Args:
      request: The model and the sizes.
      zero: The stage.
      chosen: Other passes than those of a plan.

    Raises:
      PlanError: A model that cannot be traced at two small depths.
    """
    model = load(request.model, request.layers)
    tokens = tokens_of(model, request, zero, chosen)
    built = model.build(model.depth, request.seq_len, None)
    num_params = sum(x.numel() for x in tree_leaves(built.params))
    device = _device(request.device)
    timeline = _timeline(tokens)
    sizes = [sum(moment) for moment in timeline]
    top = sizes.index(max(sizes))
    sent = _sent(tokens)
    return Stage(
        zero,
        num_params,
        _model_states(tokens, timeline, zero),
        timeline[top],
        tokens[top].key,
        dict(sent),
        sum(t.times * t.flops for t in tokens),
        sum(t.times * t.moved_bytes for t in tokens),
        sum(t.times * _seconds(t, device) for t in tokens),
        sum(sent.values()) / device.wire_bytes_per_s,
        tuple(timeline),
    )


def tokens_of(
    model: Model, request: Request, zero: Zero, chosen: tuple[Pass, ...] | None = None
) -> list[Token]:
    """The moments of the step: of the full trace, or made from two small ones."""

    def traced(depth: int | None) -> list[Token]:
        return record(lower(model, request, zero, depth, chosen=chosen))

    if model.depth is None or model.depth <= _DEPTHS[1]:
        return traced(model.depth)
    short, long = (traced(depth) for depth in _DEPTHS)
    return scaled(short, long, _DEPTHS, model.depth)


def _timeline(tokens: list[Token]) -> list[BytesByKind]:
    now, moments = BytesByKind(), []
    for token in tokens:
        now = BytesByKind(*map(operator.add, now, token.delta))
        moments.append(now)
    return moments


def _model_states(tokens: list[Token], timeline: list[BytesByKind], zero: int) -> int:
    first = timeline[[" forward " in t.key for t in tokens].index(True)]
    last = {
        phase: max(i for i, t in enumerate(tokens) if f" {phase} " in t.key)
        for phase in ("forward", "backward")
    }
    held = timeline[last["forward"]].gathered if zero < 3 else 0
    grads = timeline[last["backward"]].grads
    return first.params + first.moments + held + grads


def _sent(tokens: list[Token]) -> Counter[str]:
    payloads: Counter[tuple[str, str, int]] = Counter()
    for token in tokens:
        if token.wire is not None:
            kind, _, n, dtype = token.wire
            payloads[kind, dtype, n] += token.times * token.payload_bytes
    found: Counter[str] = Counter()
    for (kind, dtype, n), payload in payloads.items():
        found[f"{kind} {dtype}"] += sent_bytes(kind, payload, n)
    return found


def _seconds(token: Token, device: Device) -> float:
    arithmetic = token.flops / device.flops_per_s
    return max(arithmetic, token.moved_bytes / device.memory_bytes_per_s)


def _device(name: str) -> Device:
    if name not in DEVICES:
        raise PlanError(f"--device {name}: must be {', '.join(DEVICES)}")
    return DEVICES[name]
