# SPDX-License-Identifier: Apache-2.0
"""Kernels measured beside their peers, in interleaved rounds, against the copy roof."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zfunc.bench.errors import BenchError
from zfunc.bench.kernel_case import OURS, Bar, Case, Way, told, tried
from zfunc.bench.kernel_clock import Clock, roof
from zfunc.bench.rounds import rotated
from zfunc.core.tree import tree_leaves

# float32: 256 MiB in each tensor of the roof.
ROOF_NUMEL = 1 << 26
_WARMUPS = 3


class ResultsDifferError(BenchError):
    """Ways of one case computed other things, so their times say nothing."""


class Measured(NamedTuple):
    """One way of a case.

    Attributes:
      name: Of the way.
      rounds_s: The median call of each round, on the device.
      host_s: Until a call returns; None where that is no time of its own.
      launches: On the device; None where they are not counted.
      workspace_bytes: Allocated beside arguments and results.
    """

    name: str
    rounds_s: tuple[float, ...]
    host_s: float | None
    launches: int | None
    workspace_bytes: int | None

    @property
    def median_s(self) -> float:
        """The median of the rounds.

        Examples:
          >>> Measured("a", (1.0, 5.0, 2.0), None, None, None).median_s
          2.0
        """
        return statistics.median(self.rounds_s)


class Verdict(NamedTuple):
    """A bar, and what was reached.

    Attributes:
      bar: Of the case.
      got: What was measured; None where it could not be.
    """

    bar: Bar
    got: float | None

    @property
    def said(self) -> str:
        """As it is printed.

        Examples:
          >>> Verdict(Bar("roof", 0.92), 0.95).said
          'roof >= 0.92: 0.95 pass'
          >>> Verdict(Bar("faster", 1.6, "liger"), None).said
          'faster than liger >= 1.6: not measured'
        """
        if self.got is None:
            return f"{self.bar}: not measured"
        return f"{self.bar}: {self.got:.3g} {'pass' if self.passes else 'FAIL'}"

    @property
    def passes(self) -> bool | None:
        """Whether it is reached; None where nothing was measured."""
        return None if self.got is None else self.bar.passes(self.got)


class Found(NamedTuple):
    """What was measured of a case.

    Attributes:
      case: Which.
      measured: Its ways; ours is the first.
      skipped: The names of the others, and why.
      roof: Bytes per second of a copy, in the same run.
    """

    case: Case
    measured: tuple[Measured, ...]
    skipped: tuple[tuple[str, str], ...]
    roof: float

    def fraction(self, way: Measured) -> float:
        """The bytes of the case over a way's seconds, as a fraction of the roof."""
        return self.case.bytes / way.median_s / self.roof

    def ratio(self, way: Measured) -> tuple[float, float, float]:
        """A way's seconds over ours: of the medians, and the range over the rounds.

        Examples:
          >>> ours = Measured("zfunc", (1.0, 1.0), None, None, None)
          >>> peer = Measured("eager", (2.0, 3.0), None, None, None)
          >>> Found(None, (ours, peer), (), 1.0).ratio(peer)
          (2.5, 2.0, 3.0)
        """
        ours = self.measured[0]
        each = [t / o for t, o in zip(way.rounds_s, ours.rounds_s, strict=True)]
        return way.median_s / ours.median_s, min(each), max(each)

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Each bar of the case, and what was reached."""
        return tuple(Verdict(bar, self._reached(bar)) for bar in self.case.bars)

    def _reached(self, bar: Bar) -> float | None:
        ours = self.measured[0]
        if bar.what == "roof":
            return self.fraction(ours)
        if bar.peer:
            peers = [way for way in self.measured if way.name == bar.peer]
            if not peers:
                return None
            if bar.what == "faster":
                return self.ratio(peers[0])[0]
            mine, theirs = ours.workspace_bytes, peers[0].workspace_bytes
            return None if mine is None or theirs is None else theirs / max(mine, 1)
        if bar.what == "ms":
            return 1e3 * ours.median_s
        if bar.what == "host us":
            return None if ours.host_s is None else 1e6 * ours.host_s
        bytes_ = ours.workspace_bytes
        return None if bytes_ is None else bytes_ / 1e6


class Plan(NamedTuple):
    """How the cases are measured.

    Attributes:
      rounds: Passes over all ways of a case, each beginning with another one.
      calls: Timed calls of a way in a round.
      roof_numel: float32 elements of the tensors of the roof.
    """

    rounds: int
    calls: int
    roof_numel: int = ROOF_NUMEL


def run_kernels(
    cases: Sequence[Case],
    clock: Clock,
    plan: Plan,
    say: Callable[[str], None],
    keep: Callable[[list[Found]], None] = lambda found: None,
) -> tuple[list[Found], list[str]]:
    """Measure cases one after the other; the roof is measured before each.

    A case that fails does not take the others with it.

    Args:
      cases: Which.
      clock: Of the device.
      plan: How.
      say: Is told what goes on, and what is skipped.
      keep: Is given all that was measured, after each case: a run that is ended loses
        only the case that it is at.

    Returns:
      What was measured, and a sentence for each case that failed.
    """
    found: list[Found] = []
    failures = []
    best = 0.0
    for case in cases:
        say(case.name)
        gc.collect()
        try:
            best = max(best, roof(clock, plan.roof_numel, plan.rounds))
            one = measure(case, clock, plan, best)
        except BenchError as error:
            failures.append(str(error))
        except Exception as error:  # a compiler's, or the device's
            failures.append(f"{case.name}: {told(error)}")
        else:
            for name, why in one.skipped:
                say(f"  without {name}: {why}")
            found = [each._replace(roof=best) for each in (*found, one)]
            keep(found)
    return found, failures


def measure(case: Case, clock: Clock, plan: Plan, roof: float) -> Found:
    """Measure one case.

    Args:
      case: Which.
      clock: Of the device.
      plan: How.
      roof: Bytes per second of a copy.

    Raises:
      ResultsDifferError: Two ways computed other things.
    """
    made = {name: _tried(name, way) for name, way in case.ways(clock.device).items()}
    skipped = tuple((name, way) for name, way in made.items() if isinstance(way, str))
    ways = {name: way for name, way in made.items() if isinstance(way, Way)}
    if case.bound is not None and "eager" in ways:
        _compared(case, ways)
    times_s = timed(ways, clock, plan)
    measured = tuple(
        Measured(
            name,
            tuple(times_s[name]),
            clock.host_s(way),
            clock.launches(way),
            clock.workspace_bytes(way),
        )
        for name, way in ways.items()
    )
    return Found(case, measured, skipped, roof)


def _tried(name: str, way: Way | str) -> Way | str:
    return way if name == OURS or isinstance(way, str) else tried(lambda: way)


def timed(ways: Mapping[str, Way], clock: Clock, plan: Plan) -> dict[str, list[float]]:
    """The median call of each way in each round.

    Args:
      ways: By name; every round begins with another one.
      clock: Of the device.
      plan: How many.
    """
    for way in ways.values():
        for _ in range(_WARMUPS):
            way()
    times_s: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(plan.rounds):
        for name in rotated(list(ways), number):
            calls_s = [clock.device_s(ways[name]) for _ in range(plan.calls)]
            times_s[name].append(statistics.median(calls_s))
    return times_s


def _compared(case: Case, ways: Mapping[str, Way]) -> None:
    """Ours is the eager way within the bound of the case."""
    ours, theirs = (_floats(ways[name]()) for name in (OURS, "eager"))
    for a, b in zip(ours, theirs, strict=True):
        scale = b.abs().max().clamp(min=1e-6)
        apart = float((a - b).abs().max() / scale) if a.numel() else 0.0
        if not apart <= (case.bound or 0.0):
            raise ResultsDifferError(
                f"{case.name}: results are {apart:.1e} of the largest apart, expected "
                f"{case.bound:g} at most: the times cannot be compared"
            )


def _floats(out: Any) -> list[Tensor]:
    tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    return [x.detach().to(torch.float32) for x in tensors]
