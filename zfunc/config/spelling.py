# SPDX-License-Identifier: Apache-2.0
"""The nearest of the names that exist, for one that does not."""

from __future__ import annotations

from collections.abc import Iterable


def distance(one: str, other: str) -> int:
    """Letters to put in, take out, replace or swap with the next one.

    Examples:
      >>> distance("optimizer", "optimizr"), distance("stage", "satge")
      (1, 1)
    """
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(other, 1):
            best = min(before[j] + 1, row[-1] + 1, before[j - 1] + (a != b))
            swapped = i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b
            row.append(min(best, last[j - 2] + 1) if swapped else best)
    return row[-1]


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """The names that are meant, perhaps: one edit away, with its words, or nearest.

    Args:
      name: What was typed.
      names: Those that exist.

    Examples:
      >>> nearest("optimzer", ["optimizer", "scheduler"]), nearest("x", ["optimizer"])
      (['optimizer'], [])
      >>> nearest("warmup_steps", ["warmup_type", "warmup_num_steps"])
      ['warmup_num_steps']
    """
    short = name[:100].lower()
    names = list(names)
    apart = {each: distance(short, each.lower()) for each in dict.fromkeys(names)}
    least = min(apart.values(), default=0)
    if least > 1:
        words = set(short.split("_"))
        whole = [each for each in names if words < set(each.lower().split("_"))]
        if len(words) > 1 and whole:
            return whole
    if least > max(1, len(short) // 3):
        return []
    return [each for each, far in apart.items() if far == least]
