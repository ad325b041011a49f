# SPDX-License-Identifier: Apache-2.0
"""Where a program repeats itself: equal layers, forward and backward.

A program is seen as a row of numbers, equal for calls that are alike. A layer that
comes n times is a run of period p: each number equals that p places on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.int64]
# Cutting has a price: what is cut apart is not fused. A run pays when it is longer than
# this, and its pieces are made at least this long.
MIN_RUN_CALLS: Final = 96
MIN_PIECE_CALLS: Final = 48


@dataclass(frozen=True)
class Run:
    """``count`` repetitions of ``period`` places, and ``slack`` places more.

    The repetitions may start at ``start`` or up to ``slack`` places later.
    """

    start: int
    period: int
    count: int
    slack: int

    @property
    def stop(self) -> int:
        """The place after the last that belongs to the run, slack included."""
        return self.start + self.period * self.count + self.slack


def repeated_runs(row: Row, offset: int = 0) -> list[Run]:
    """The longest run, then those before and behind it; short ones are left out.

    Of several periods the shortest that covers as much is taken.

    Examples:
      >>> layers = np.array([7] + [1, 2, 3, 4] * 30 + [8])
      >>> repeated_runs(layers)
      [Run(start=1, period=4, count=30, slack=0)]
    """
    best = _longest_run(row)
    if best is None:
        return []
    before = repeated_runs(row[: best.start], offset)
    behind = repeated_runs(row[best.stop :], offset + best.stop)
    shifted = Run(best.start + offset, best.period, best.count, best.slack)
    return [*before, shifted, *behind]


def _longest_run(row: Row) -> Run | None:
    best, covered = None, MIN_RUN_CALLS
    for period in range(1, len(row) // 2 + 1):
        start, length = _longest_true(row[:-period] == row[period:])
        if length >= period and length + period > covered:
            count, slack = divmod(length + period, period)
            best, covered = Run(start, period, count, slack), length + period
    return best


def _longest_true(mask: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Start and length of the longest stretch of True."""
    edges = np.diff(np.concatenate(([0], mask.view(np.int8), [0])))
    starts, stops = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not len(starts):
        return 0, 0
    longest = int(np.argmax(stops - starts))
    return int(starts[longest]), int(stops[longest] - starts[longest])


def cuts(row: Sequence[int], reads: Sequence[Sequence[int]]) -> Iterator[int]:
    """The places before which to cut, so that repetitions become equal pieces.

    ``reads[i]`` are the places of the values that call i reads. Repetitions start where
    they hand the fewest values to each other.
    """
    users = _users(reads)
    for run in repeated_runs(np.asarray(row, dtype=np.int64)):
        group = max(1, -(-MIN_PIECE_CALLS // run.period))
        if run.count < 2 * group:
            continue
        start = min(
            range(run.start, run.start + run.slack + 1),
            key=lambda s: _handed_on(users, s + run.period, run.period),
        )
        stop = start + run.period * run.count
        yield from range(start, stop, group * run.period)
        yield stop


def _users(reads: Sequence[Sequence[int]]) -> list[list[int]]:
    users: list[list[int]] = [[] for _ in reads]
    for place, read in enumerate(reads):
        for value in read:
            users[value].append(place)
    return users


def _handed_on(users: list[list[int]], cut: int, period: int) -> int:
    """How many values of the repetition before the cut the one behind it reads."""
    made = range(cut - period, cut)
    return sum(any(cut <= user < cut + period for user in users[i]) for i in made)


def numbered(keys: Sequence[Any]) -> list[int]:
    """Equal keys as equal numbers, in order of appearance.

    Examples:
      >>> numbered(["mm", "add", "mm"])
      [0, 1, 0]
    """
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]
