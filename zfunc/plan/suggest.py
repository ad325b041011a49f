# SPDX-License-Identifier: Apache-2.0
"""The smallest change that makes a model fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final, NamedTuple

from zfunc.plan.planner import Stage, plan
from zfunc.plan.request import Request
from zfunc.plan.tracing import Zero

_STAGES: Final[tuple[Zero, ...]] = (0, 1, 2, 3)
_MAX_RANKS: Final = 2**16


class Suggestion(NamedTuple):
    """A configuration and its plan; ``fits`` is False where none was found."""

    request: Request
    stage: Stage
    fits: bool


def suggest(request: Request, memory_bytes: int) -> Suggestion:
    """The cheapest configuration of which a rank's peak is within ``memory_bytes``.

    Tried in the order of what they cost: stages 0 to 3 as asked, then recomputation in
    the backward, then as many microbatches as there are samples, then twice the ranks
    again and again (with the same samples on each). The first that fits is suggested;
    if none does, the one that needs the least.
    """
    least: Suggestion | None = None
    for candidate, zero in _candidates(request):
        stage = plan(candidate, zero)
        tried = Suggestion(candidate, stage, stage.peak_bytes <= memory_bytes)
        if tried.fits:
            return tried
        if least is None or stage.peak_bytes < least.stage.peak_bytes:
            least = tried
    if least is None:
        raise AssertionError("there is always a candidate")
    return least


def _candidates(request: Request) -> Iterator[tuple[Request, Zero]]:
    for zero in _STAGES:
        yield request, zero
    small = dataclasses.replace(request, remat=True)
    if not request.remat:
        yield small, 2
        yield small, 3
    if request.samples_per_rank > request.microbatches:
        small = dataclasses.replace(small, microbatches=request.samples_per_rank)
        yield small, 3
    ranks, each = 2 * request.ranks, small.samples_per_rank
    while ranks <= _MAX_RANKS:
        yield dataclasses.replace(small, ranks=ranks, batch_size=each * ranks), 3
        ranks *= 2


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
