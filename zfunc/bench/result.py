# SPDX-License-Identifier: Apache-2.0
"""What a benchmark found, as numbers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# Losses of float32 trainings that are the same differ by less, over 15 steps.
LOSS_TOLERANCE = 1e-5


class Measured(NamedTuple):
    """One contender.

    Attributes:
      name: Of the contender.
      losses: Of each step from the first weights.
      rounds_s: The seconds of each timed step, by round.
      live_peak_bytes: The most bytes of tensors alive during a step; None if unknown.
    """

    name: str
    losses: tuple[float, ...]
    rounds_s: tuple[tuple[float, ...], ...]
    live_peak_bytes: int | None

    @property
    def medians_s(self) -> tuple[float, ...]:
        """The median step of each round.

        Examples:
          >>> Measured("a", (), ((1.0, 2.0, 9.0), (3.0, 3.0, 3.0)), None).medians_s
          (2.0, 3.0)
        """
        return tuple(statistics.median(steps_s) for steps_s in self.rounds_s)

    @property
    def median_s(self) -> float:
        """The median of the rounds' medians."""
        return statistics.median(self.medians_s)


class Ratio(NamedTuple):
    """The time of a contender divided by that of a peer.

    Attributes:
      name: The contender.
      peer: What it is compared with.
      ratio: Of their medians; less than 1 is faster than the peer.
      low: The least ratio of medians of one round.
      high: The greatest.
    """

    name: str
    peer: str
    ratio: float
    low: float
    high: float


class LossDifference(NamedTuple):
    """The largest difference of losses between two contenders at one step.

    Attributes:
      largest: The difference.
      step: Where, counted from 1.
      low: The contender with the least loss there.
      high: The one with the greatest.
    """

    largest: float
    step: int
    low: str
    high: str

    @property
    def is_small(self) -> bool:
        """Whether the trainings are the same; not so if a loss is not a number."""
        return self.largest <= LOSS_TOLERANCE


class Result(NamedTuple):
    """A whole benchmark.

    Attributes:
      about: Model, ranks, versions and options, ready for JSON.
      measured: Every contender.
      ratios: Of those that have peers here.
      loss_difference: Between the contenders.
      peak_rss_bytes: Of the rank that held the most, all contenders together.
      left_out: Contenders that are not installed.
    """

    about: Mapping[str, Any]
    measured: tuple[Measured, ...]
    ratios: tuple[Ratio, ...]
    loss_difference: LossDifference
    peak_rss_bytes: int
    left_out: tuple[str, ...]


def ratios(
    measured: Sequence[Measured], peers: Mapping[str, Sequence[str]]
) -> tuple[Ratio, ...]:
    """How each contender compares with its peers that took part.

    Args:
      measured: Every contender.
      peers: The names of the peers of each contender that has some.

    Examples:
      >>> ours = Measured("ours", (), ((1.0,), (1.0,), (1.5,)), None)
      >>> peer = Measured("peer", (), ((2.0,), (2.5,), (2.0,)), None)
      >>> ratios([ours, peer], {"ours": ["peer", "absent"]})
      (Ratio(name='ours', peer='peer', ratio=0.5, low=0.4, high=0.75),)
    """
    by_name = {contender.name: contender for contender in measured}
    found = []
    for contender in measured:
        for name in peers.get(contender.name, ()):
            if name not in by_name:
                continue
            peer = by_name[name]
            pairs = zip(contender.medians_s, peer.medians_s, strict=True)
            each = [mine_s / theirs_s for mine_s, theirs_s in pairs]
            ratio = contender.median_s / peer.median_s
            found.append(Ratio(contender.name, name, ratio, min(each), max(each)))
    return tuple(found)


def loss_difference(measured: Sequence[Measured]) -> LossDifference:
    """Where the losses of the contenders are furthest apart.

    A loss that is not a number is infinitely far from all others.

    Args:
      measured: At least one contender, with equally many losses.

    Examples:
      >>> a = Measured("a", (5.0, 4.0), (), None)
      >>> b = Measured("b", (5.0, 4.5), (), None)
      >>> loss_difference([a, b])
      LossDifference(largest=0.5, step=2, low='a', high='b')
    """
    worst = LossDifference(0.0, 1, measured[0].name, measured[0].name)
    for index in range(len(measured[0].losses)):
        losses = [(_comparable(c.losses[index]), c.name) for c in measured]
        (low, low_name), (high, high_name) = min(losses), max(losses)
        apart = high - low if low < float("inf") else float("inf")
        if apart > worst.largest:
            worst = LossDifference(apart, index + 1, low_name, high_name)
    return worst


def _comparable(loss: float) -> float:
    return loss if abs(loss) < float("inf") else float("inf")
