# SPDX-License-Identifier: Apache-2.0
"""Which rank holds which part of a leaf: index arithmetic, and nothing else.

Ranks are numbered row-major over the axes of the mesh. A dim of size d that an axis of
n ranks shards is held in pieces of ceil(d / n); what is beyond d is padding. Of equal
pieces (a leaf that some axis does not shard) the rank with coordinate 0 holds the one
that is stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

Axes = Sequence[tuple[str, int]]
Spec = Sequence[str | None]
Range = tuple[int, int]

# torch's name, the name in a safetensors header, bytes per element.
DTYPES = (
    ("float64", "F64", 8),
    ("float32", "F32", 4),
    ("float16", "F16", 2),
    ("bfloat16", "BF16", 2),
    ("float8_e4m3fn", "F8_E4M3", 1),
    ("float8_e4m3fnuz", "F8_E4M3FNUZ", 1),
    ("float8_e5m2", "F8_E5M2", 1),
    ("float8_e5m2fnuz", "F8_E5M2FNUZ", 1),
    ("complex64", "C64", 8),
    ("int64", "I64", 8),
    ("int32", "I32", 4),
    ("int16", "I16", 2),
    ("int8", "I8", 1),
    ("uint64", "U64", 8),
    ("uint32", "U32", 4),
    ("uint16", "U16", 2),
    ("uint8", "U8", 1),
    ("bool", "BOOL", 1),
)


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in torch, without the module.

    Example:
      >>> dtype_name(torch.bfloat16)
      'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def stored_dtype(name: str) -> tuple[str, int] | None:
    """The name in a safetensors header and the bytes per element; None if it has none.

    Example:
      >>> stored_dtype("bfloat16"), stored_dtype("complex128")
      (('BF16', 2), None)
    """
    return next(((code, size) for known, code, size in DTYPES if known == name), None)


def coordinates(axes: Axes, rank: int) -> dict[str, int]:
    """The place of a rank on each axis.

    Example:
      >>> coordinates([("data", 2), ("tensor", 3)], 4)
      {'data': 1, 'tensor': 1}
    """
    places = {}
    for name, size in reversed(axes):
        rank, places[name] = divmod(rank, size)
    return dict(reversed(places.items()))


def rank_at(axes: Axes, places: dict[str, int]) -> int:
    """The rank at these coordinates; an axis that is not named counts as 0.

    Example:
      >>> rank_at([("data", 2), ("tensor", 3)], {"data": 1})
      3
    """
    rank = 0
    for name, size in axes:
        rank = rank * size + places.get(name, 0)
    return rank


def is_stored_by(axes: Axes, spec: Spec, rank: int) -> bool:
    """True if ``rank`` writes its piece of a leaf: it is 0 on the other axes.

    Example:
      >>> axes = [("data", 2), ("tensor", 2)]
      >>> [is_stored_by(axes, ["tensor"], rank) for rank in range(4)]
      [True, True, False, False]
    """
    places = coordinates(axes, rank)
    return all(place == 0 for name, place in places.items() if name not in spec)


def local_shape(axes: Axes, spec: Spec, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of every rank's piece, padding included.

    Example:
      >>> local_shape([("data", 2)], ["data"], [5, 3])
      (3, 3)
    """
    sizes = dict(axes)
    entries = itertools.chain(spec, itertools.repeat(None))
    return tuple(
        d if axis is None else -(-d // sizes[axis])
        for d, axis in zip(shape, entries, strict=False)
    )


def held_region(
    axes: Axes, spec: Spec, shape: Sequence[int], rank: int
) -> tuple[Range, ...]:
    """The global indices that a rank holds, per dim; padding is not part of it.

    Example:
      >>> [held_region([("data", 3)], ["data"], [4], rank) for rank in range(3)]
      [((0, 2),), ((2, 4),), ((4, 4),)]
    """
    places = coordinates(axes, rank)
    pieces = local_shape(axes, spec, shape)
    region = []
    for i, (d, piece) in enumerate(zip(shape, pieces, strict=True)):
        axis = spec[i] if i < len(spec) else None
        start = 0 if axis is None else places[axis] * piece
        region.append((min(start, d), min(start + piece, d)))
    return tuple(region)


class Source(NamedTuple):
    """A box of a stored piece, and where it goes in the region that is wanted."""

    rank: int
    source: tuple[slice, ...]
    target: tuple[slice, ...]


def sources(
    axes: Axes, spec: Spec, shape: Sequence[int], region: Sequence[Range]
) -> Iterator[Source]:
    """The stored boxes that make up a region of a leaf, each exactly once.

    Example:
      >>> for s in sources([("data", 2)], ["data"], [5], [(2, 4)]):
      ...     print(s.rank, s.source, s.target)
      0 (slice(2, 3, None),) (slice(0, 1, None),)
      1 (slice(0, 1, None),) (slice(1, 2, None),)
    """
    pieces = local_shape(axes, spec, shape)
    per_dim = []
    for i, ((start, stop), piece) in enumerate(zip(region, pieces, strict=True)):
        axis = spec[i] if i < len(spec) else None
        first, last = (start // piece, -(-stop // piece)) if stop > start else (0, 0)
        parts = []
        for place in range(first, last):
            a, b = max(start, place * piece), min(stop, (place + 1) * piece)
            taken = slice(a - place * piece, b - place * piece)
            parts.append((axis, place, taken, slice(a - start, b - start)))
        per_dim.append(parts)
    for chosen in itertools.product(*per_dim):
        places = {axis: place for axis, place, _, _ in chosen if axis is not None}
        yield Source(
            rank_at(axes, places),
            tuple(taken for _, _, taken, _ in chosen),
            tuple(put for _, _, _, put in chosen),
        )
