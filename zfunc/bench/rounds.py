# SPDX-License-Identifier: Apache-2.0
"""Running the contenders: first the losses of each, then rounds of timed steps."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from zfunc.bench.contenders import Contender
from zfunc.bench.memory import live_peak
from zfunc.bench.setup import Setup, Step

T = TypeVar("T")

# Counted from 0: the first step that is like all later ones. The first makes the
# optimizer's moments and traces or compiles, the second may build buckets anew.
LIVE_STEP = 2


class Started(NamedTuple):
    """A contender that has trained on every batch once.

    Attributes:
      name: Of the contender.
      step: Goes on from there.
      losses: Of each step, means over the ranks.
      live_peak_bytes: The most bytes of tensors that were alive during a step, on the
        rank with the most; None where they cannot be counted.
    """

    name: str
    step: Step
    losses: tuple[float, ...]
    live_peak_bytes: int | None


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The same items, beginning further on.

    Examples:
      >>> rotated("abc", 1)
      ['b', 'c', 'a']
    """
    by %= len(items)
    return [*items[by:], *items[:by]]


def start(
    contender: Contender, setup: Setup, batches: Sequence[torch.Tensor]
) -> Started:
    """Build a contender from the first weights and train it on each batch.

    Args:
      contender: Which.
      setup: What all contenders share.
      batches: Of this rank, more than ``LIVE_STEP``.
    """
    _forget_garbage()
    with live_peak(setup.device, counted=contender.counted) as live:
        step = contender.make(setup)
        losses = [step(ids) for ids in batches[:LIVE_STEP]]
        live.restart()
        losses.append(step(batches[LIVE_STEP]))
    losses += [step(ids) for ids in batches[LIVE_STEP + 1 :]]
    means = _reduced(torch.stack(losses).double(), dist.ReduceOp.SUM) / setup.world
    peak_bytes = live.peak_bytes
    if peak_bytes is not None:
        counted = torch.tensor(peak_bytes, device=setup.device)
        peak_bytes = int(_reduced(counted, dist.ReduceOp.MAX))
    return Started(contender.name, step, tuple(means.tolist()), peak_bytes)


def time_round(
    started: Sequence[Started],
    batches: Sequence[torch.Tensor],
    number: int,
    warmup: int,
) -> dict[str, list[float]]:
    """Time every contender once; each round begins with another one.

    Args:
      started: The contenders.
      batches: Of this rank; one timed step for each.
      number: Of the round, from 0.
      warmup: Steps of each contender before those that are timed.

    Returns:
      The seconds of each step of each contender, on the slowest rank.
    """
    times_s = {}
    for contender in rotated(started, number):
        _forget_garbage()
        for index in range(warmup):
            contender.step(batches[index % len(batches)])
        mine_s = [_timed(contender.step, ids) for ids in batches]
        slowest = torch.tensor(mine_s, dtype=torch.float64, device=batches[0].device)
        times_s[contender.name] = _reduced(slowest, dist.ReduceOp.MAX).tolist()
    return times_s


def _timed(step: Step, ids: torch.Tensor) -> float:
    _wait_for_all(ids.device)
    begin_s = time.perf_counter()
    step(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin_s


def _wait_for_all(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def _forget_garbage() -> None:
    """The collector then looks at what the next contender makes, not at the others."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _reduced(values: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(values, op)
    return values
