# SPDX-License-Identifier: Apache-2.0
"""Values that a piece computes again instead of being given them.

A backward reads what the forward made: a normalized activation is written to memory and
read back, though it is one multiplication of two values that the backward reads anyway.
Fused into the calls that use it, it costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node

from zfunc.program import ir

MAX_CALLS: Final = 8
# What is smaller is not worth a thought, and a 0-d tensor would be computed again for
# each element of what reads it.
MIN_BYTES: Final = 256

aten = torch.ops.aten
_FUSED: Final = frozenset(
    {aten._to_copy.default, aten.full.default, aten.arange.default}
)
_TAGS: Final = frozenset({torch.Tag.pointwise})
_USES: Final = _TAGS | {torch.Tag.reduction}


@dataclass(frozen=True)
class Places:
    """Where values are made and read, as a program is cut now.

    ``place`` is the number of the part that makes a value, ``given`` what each part is
    given, ``kept`` the values that have to be in memory whoever computes them again,
    and ``written`` the part, if any, that first writes over a value. ``sources`` are
    what a call reads, and ``users`` what reads a value, seen through views.
    """

    place: Mapping[Node, int]
    given: dict[int, dict[Node, None]]
    kept: frozenset[Node]
    written: Mapping[Node, int]
    sources: Callable[[Node], Iterable[Node]]
    users: Callable[[Node], Iterable[Node]]


def values_to_remake(places: Places) -> dict[int, set[Node]]:
    """For each part, the calls of other parts that it makes again.

    Only where it spares memory: nothing larger may be kept in the value's stead.
    """
    remade: dict[int, set[Node]] = {part: set() for part in places.given}
    candidates = {
        node
        for values in places.given.values()
        for node in values
        if places.place.get(node) in places.given
        and _is_fused(node)
        and ir.val_bytes(node) > MIN_BYTES
    } - places.kept
    order = {node: i for i, node in enumerate(places.place)}
    for value in sorted(candidates, key=order.__getitem__, reverse=True):
        parts = [part for part, values in places.given.items() if value in values]
        plans = [_plan(value, part, places, remade[part]) for part in parts]
        for part, plan in zip(parts, plans, strict=True):
            if all(plans) and plan is not None:
                del places.given[part][value]
                remade[part] |= plan.calls
                places.given[part].update(dict.fromkeys(plan.read))
    return remade


@dataclass(frozen=True)
class _Plan:
    """How a part would make a value: the calls, and what it is to be given."""

    calls: set[Node]
    read: list[Node]


def _plan(value: Node, part: int, places: Places, remade: set[Node]) -> _Plan | None:
    """None where the value is better handed over."""
    inside = [n for n in places.users(value) if places.place.get(n) == part]
    if not all(_is_fused(n, _USES) for n in inside):
        return None  # it would have to be in memory here as well
    calls, read, todo = {value}, dict[Node, None](), list(places.sources(value))
    while todo:
        node = todo.pop()
        if node in read or node in calls or node in remade:
            continue
        near = places.place.get(node) == places.place[value]
        is_there = node in places.given[part] or ir.val_bytes(node) <= MIN_BYTES
        if near and not is_there and _is_fused(node):
            calls.add(node)
            todo += places.sources(node)
        else:
            read[node] = None
    if len(calls) > MAX_CALLS or any(places.written.get(n, part) < part for n in read):
        return None
    size = ir.val_bytes(value)
    known = places.given[part]
    new = sum(ir.val_bytes(n) for n in read if n not in known and n in places.place)
    num_large = sum(2 * ir.val_bytes(n) >= size for n in read)
    if new < size or (new == size and num_large == 1):
        return _Plan(calls, [n for n in read if n not in known])
    return None


def _is_fused(node: Node, tags: frozenset[Any] = _TAGS) -> bool:
    """True for a call that is made part of the loop that reads its result."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        target in _FUSED or not tags.isdisjoint(target.tags)
    )
