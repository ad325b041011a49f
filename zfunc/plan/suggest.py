# SPDX-License-Identifier: Apache-2.0
"""The cheapest configuration that fits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from zfunc.plan.models import load
from zfunc.plan.planner import STAGES, Stage, plan
from zfunc.plan.request import Request
from zfunc.plan.tracing import Zero

_MAX_RANKS: Final = 2**16

Planner = Callable[[Request, Zero], Stage]


class Suggestion(NamedTuple):
    """A configuration and its plan; ``fits`` is False where none was found."""

    request: Request
    stage: Stage
    fits: bool


def suggest(
    request: Request,
    memory_bytes: int,
    known: Iterable[Stage] = (),
) -> Suggestion:
    """The cheapest configuration of which a rank's peak is within ``memory_bytes``.

    The ranks and the samples stay. What recomputes nothing comes first, then what sends
    least, then the fewest microbatches, then the lowest stage. Where nothing fits, the
    ranks are doubled again and again with the same samples on each, at stage 3; where
    that does not help, it is the one that needs the least.

    Args:
      request: What was asked for.
      memory_bytes: Of a rank.
      known: Plans of ``request`` that exist already.
    """
    made = {stage.zero: stage for stage in known}

    @functools.cache
    def planned(candidate: Request, zero: Zero) -> Stage:
        if candidate == request and zero in made:
            return made[zero]
        return plan(candidate, zero, check=False)

    def state_fits(zero: Zero) -> bool:
        states = made[zero].states if zero in made else None
        return states is None or states.params + states.moments <= memory_bytes

    best: Suggestion | None = None
    stages = [zero for zero in STAGES if state_fits(zero)]
    for candidate, zero in _candidates(request, stages, memory_bytes, planned):
        stage = planned(candidate, zero)
        tried = Suggestion(candidate, stage, stage.peak_bytes <= memory_bytes)
        if tried.fits:
            return tried
        if best is None or stage.peak_bytes < best.stage.peak_bytes:
            best = tried
    if best is None:
        raise AssertionError("there is always a candidate")
    return best


def _candidates(
    request: Request, stages: list[Zero], memory_bytes: int, planned: Planner
) -> Iterator[tuple[Request, Zero]]:
    """What to try, in the order of what it costs."""
    samples = request.samples_per_rank
    counts = [m for m in range(1, samples + 1) if samples % m == 0]
    takes_remat = load(request.model, request.layers).takes_remat
    for remat in (False, True) if takes_remat else (False,):
        # Fewer microbatches have more activations, and no sum of gradients beside a new
        # one: what needs the least is at one of the ends.
        ends = [_with(request, remat=remat, microbatches=m) for m in {1, samples}]
        possible = [
            zero
            for zero in stages
            if any(planned(end, zero).peak_bytes <= memory_bytes for end in ends)
        ]
        pairs = [(m, zero) for m in counts for zero in possible]
        for m, zero in sorted(pairs, key=lambda pair: (_sent(*pair), *pair)):
            yield _with(request, remat=remat, microbatches=m), zero
    base = min(ends, key=lambda end: planned(end, 3).peak_bytes)
    yield base, 3
    while base.ranks < _MAX_RANKS:
        samples = 2 * base.samples
        base = dataclasses.replace(base, ranks=2 * base.ranks, batch_size=samples)
        yield base, 3


def _with(request: Request, *, remat: bool, microbatches: int) -> Request:
    """The request with other values and the same samples."""
    changed = dataclasses.replace(request, remat=remat, microbatches=microbatches)
    if changed.samples == request.samples:
        return changed
    return dataclasses.replace(changed, batch_size=request.samples)


def _sent(microbatches: int, zero: Zero) -> int:
    """Parameters on the wire in a step, in units of all."""
    return (2, 2, 1 + microbatches, 3 * microbatches)[zero]


def command(request: Request, zero: int) -> str:
    """The command line that plans a configuration.

    Example:
      >>> command(Request(model="tiny", ranks=8, remat=True), 3)
      'zfunc plan --model tiny --ranks 8 --remat --zero 3'
    """
    words = ["zfunc plan"]
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if value == field.default:
            continue
        flag = "--" + field.name.replace("_", "-")
        words.append(flag if value is True else f"{flag} {value}")
    return " ".join([*words, f"--zero {zero}"])


def transformations(request: Request, zero: int) -> str:
    """The same as transformations of a step.

    Example:
      >>> transformations(Request(model="tiny", ranks=8, microbatches=2), 3)
      'zf.partition(zero=3), zf.precision("bf16"), zf.accumulate(2)'
    """
    reduce = "" if request.reduce == "fp32" else ", reduce_dtype=torch.bfloat16"
    parts = [
        f"zf.partition(zero={zero}{reduce})",
        f'zf.precision("{request.precision}")',
    ]
    if request.microbatches > 1:
        parts.append(f"zf.accumulate({request.microbatches})")
    if request.remat:
        parts.append("zf.remat(block)")
    return ", ".join(parts)
