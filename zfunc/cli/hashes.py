# SPDX-License-Identifier: Apache-2.0
"""hashes.jsonl: a number for each leaf of the state, so that a run can be repeated."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

import zfunc as zf
from zfunc.checkpoint.layout import held_region
from zfunc.cli.rundir import write_atomically
from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.tree import leaves_with_path

_INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)
_CHUNK = 2**20  # elements: their products are 8 bytes each
_MASK = 2**64 - 1

Hashes = Mapping[str, str]


def hashed_leaves(state: zf.TrainState) -> list[tuple[str, Any]]:
    """The leaves that are hashed, by path: all but the metrics.

    Args:
      state: Of a training.
    """
    return leaves_with_path(state.replace(metrics=None), is_sharded)


def hashes_of(state: zf.TrainState, mesh: zf.Mesh) -> torch.Tensor:
    r"""A hash of each leaf, int64, the same on every rank and every mesh.

    With :math:`b_i` the bits of element i of the whole leaf, row-major,
    :math:`h = \sum_i (2 i + 1) b_i \bmod 2^{64}`: the factors are odd, so a change of
    one element always changes it. A few passes over this rank's part of the state, and
    one message; nothing is waited for. (It finds errors, not forgeries.)

    Args:
      state: Placed by ``P("data")`` or ``P()``, as ``zfunc train`` does.
      mesh: Where it is.

    Returns:
      One row: the hashes in the order of ``hashed_leaves``.

    Raises:
      ValueError: A leaf that is sharded along another dim than its first.

    Examples:
      >>> mesh = zf.make_mesh({"data": 1})
      >>> state = zf.shard({"w": torch.tensor([1.0, 0.0])}, mesh)
      >>> hashes_of(state, mesh).tolist() == [0, 0x3F800000, 0, 0]
      True
    """
    mine = torch.stack([_own_part(p, x, mesh) for p, x in hashed_leaves(state)])
    if mesh.size == 1:
        return mine
    rows: torch.Tensor = zf.all_gather(mine.unsqueeze(0), "data", mesh)
    return rows.sum(dim=0)


def named(paths: Iterable[str], hashes: torch.Tensor) -> dict[str, str]:
    """Hashes by the paths of their leaves, as text; waits for the device.

    Examples:
      >>> named(["step"], torch.tensor([-1]))
      {'step': 'ffffffffffffffff'}
    """
    numbers = hashes.tolist()
    return {p: f"{h & _MASK:016x}" for p, h in zip(paths, numbers, strict=True)}


def _own_part(path: str, leaf: Any, mesh: zf.Mesh) -> torch.Tensor:
    """The sum over the elements that this rank has, or has first."""
    rank, start, buffer = int(mesh.rank), 0, leaf
    if isinstance(leaf, Sharded):
        spec, shape, buffer = leaf.sharding.spec, leaf.global_shape, leaf.buffer
        if any(axis is not None for axis in tuple(spec)[1:]):
            raise ValueError(f"{path} is placed by {spec}, expected P('data') or P()")
        if leaf.sharding.axes:
            first, stop = held_region(mesh.axes, tuple(spec), shape, rank)[0]
            buffer = buffer[: stop - first]
            start, rank = first * math.prod(shape[1:]), 0
    total = torch.zeros((), dtype=torch.int64, device=buffer.device)
    if rank != 0:  # a copy: rank 0 has it
        return total
    integer = _INTEGERS[int(math.log2(buffer.element_size()))]
    for i, chunk in enumerate(buffer.detach().reshape(-1).view(integer).split(_CHUNK)):
        at = start + i * _CHUNK
        odd = torch.arange(at, at + chunk.numel(), device=chunk.device) * 2 + 1
        total = total + (chunk * odd).sum()
    return total


def read_hashes(path: Path, last_step: int | None = None) -> dict[int, Hashes]:
    """The hashes of a run by step; a line that was cut off is left out.

    Args:
      path: The file; none is no hashes.
      last_step: The last step to read; all if None.
    """
    if not path.exists():
        return {}
    with path.open(encoding="utf-8") as file:
        rows = [row for row in map(_parsed, file) if row is not None]
    return {s: leaves for s, leaves in rows if last_step is None or s <= last_step}


def _parsed(line: str) -> tuple[int, Hashes] | None:
    try:
        row = json.loads(line)
        return int(row["step"]), dict(row["leaves"])
    except (ValueError, KeyError, TypeError):
        return None


def format_hashes(rows: Mapping[int, Hashes]) -> str:
    """Hashes by step as JSON, a line for each step.

    Examples:
      >>> print(format_hashes({3: {"step": "0000000000000003"}}), end="")
      {"step":3,"leaves":{"step":"0000000000000003"}}
    """
    return "".join(
        json.dumps({"step": step, "leaves": dict(leaves)}, separators=(",", ":")) + "\n"
        for step, leaves in rows.items()
    )


class HashesFile:
    """A file of hashes that is written to; they are on the disk's side at once.

    Args:
      path: The file. What is after ``last_step`` is dropped.
      last_step: The step that the run goes on from; 0 begins the file.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        write_atomically(path, format_hashes(read_hashes(path, last_step)))
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, hashes: Hashes) -> None:
        """Add a step."""
        self._file.write(format_hashes({step: hashes}))
        self._file.flush()

    def sync(self) -> None:
        """Wait until all of them would survive a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it is complete without this."""
        self._file.close()
