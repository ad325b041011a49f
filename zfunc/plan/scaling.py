# SPDX-License-Identifier: Apache-2.0
"""From two small depths to any: repeated layers are traced once and scaled.

The token sequences of a model at two depths differ by the parts that one more layer
adds: one in the forward, one in the backward, one for each loop of the update over all
parameters. The longer sequence is the shorter one with these parts inserted; a deeper
model has each of them as many times more. Everything counted is an integer, so what is
scaled is exact, and a third depth is traced to check that it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from zfunc.plan.errors import PlanError
from zfunc.plan.recording import Token

_NEVER: Final = 10**9
_UNLIKE: Final = "the two depths do not differ by repeated parts"


class Block(NamedTuple):
    """Tokens ``start`` to ``stop`` of the longer sequence, absent from the shorter."""

    start: int
    stop: int


def inserted(
    short: Sequence[Hashable], long: Sequence[Hashable], fixed: Sequence[bool]
) -> list[Block]:
    """The fewest blocks whose removal turns ``long`` into ``short``.

    What of ``long`` is ``fixed`` is in no block.

    Dynamic programming over (position in short, how far long is ahead), a row of all
    leads at a time. Where a sequence repeats, a block may lie in several places, and
    all of them mean the same.

    Raises:
      PlanError: ``short`` is not ``long`` without some blocks.

    Example:
      >>> inserted("aXbYc", "aXXbYYc", [False] * 7)
      [Block(start=1, stop=2), Block(start=4, stop=5)]
    """
    numbers: dict[Hashable, int] = {}
    a, b = (
        np.array([numbers.setdefault(x, len(numbers)) for x in sequence], dtype=int)
        for sequence in (short, long)
    )
    excess, walls = len(b) - len(a), np.array(fixed)
    if excess < 0:
        raise PlanError(_UNLIKE)
    cost = np.full(excess + 1, _NEVER)
    cost[0] = 0
    before = []  # at each position of short: the lead that each lead comes from
    for i in range(len(a) + 1):
        stops = np.flatnonzero(walls[i : i + excess]) + 1
        came_from, cost = _with_insertion(cost, stops)
        before.append(came_from)
        if i < len(a):
            cost = np.where(b[i : i + excess + 1] == a[i], cost, _NEVER)
    if cost[excess] >= _NEVER:
        raise PlanError(_UNLIKE)
    blocks, lead = [], excess
    for i in range(len(a), -1, -1):
        source = int(before[i][lead])
        if source < lead:
            blocks.append(Block(i + source, i + lead))
        lead = source
    return blocks[::-1]


def _with_insertion(cost: Any, stops: Any) -> tuple[Any, Any]:
    """The cheapest way to each lead with at most one block more, and where from.

    No block leads from before one of the ``stops`` to it or beyond.
    """
    leads = np.arange(len(cost))
    source, made = leads.copy(), cost.copy()
    for start, stop in itertools.pairwise([0, *stops, len(cost)]):
        part = cost[start:stop]
        least = np.minimum.accumulate(part)
        where = np.maximum.accumulate(np.where(part == least, leads[start:stop], 0))
        opened = least[:-1] + 1
        better = opened < part[1:]
        made[start + 1 : stop][better] = opened[better]
        source[start + 1 : stop][better] = where[:-1][better]
    return source, made


def scaled(
    short: Sequence[Token], long: Sequence[Token], depths: tuple[int, int], depth: int
) -> list[Token]:
    """The tokens at ``depth``, from those at two depths that differ by one.

    Raises:
      PlanError: The sequences do not differ by repeated parts.
    """
    first, second = depths
    if second != first + 1 or depth < second:
        raise ValueError(f"cannot scale from depths {depths} to {depth}")
    first_keys, second_keys = ([_matched(t) for t in ts] for ts in (short, long))
    blocks = inserted(first_keys, second_keys, [t.wide for t in long])
    result: list[Token] = []
    kept, i = 0, 0
    for block in [*blocks, Block(len(long), len(long))]:
        for token in long[kept : block.start]:
            result.append(_grown(short[i], token, depth - second))
            i += 1
        result.extend([*long[block.start : block.stop]] * (depth - first))
        kept = block.stop
    return result


def _matched(token: Token) -> Hashable:
    """What has to agree in two sequences: all but the numbers of a wide token."""
    return (token.key, token.times) if token.wide else token


def _grown(at_first: Token, at_second: Token, more: int) -> Token:
    if not at_second.wide:
        return at_second
    numbers = zip(at_first.numbers, at_second.numbers, strict=True)
    return at_second.with_numbers(tuple(b + more * (b - a) for a, b in numbers))
