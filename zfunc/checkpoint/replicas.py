# SPDX-License-Identifier: Apache-2.0
"""Copies of one value on several ranks are equal, or nothing is saved.

A replicated leaf is stored once. If a bit flipped in one rank's copy, to store rank 0's
would pick a winner in silence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from zfunc.checkpoint.agree import agree
from zfunc.checkpoint.files import tensor_bytes
from zfunc.checkpoint.layout import coordinates
from zfunc.checkpoint.manifest import METRICS_PREFIX, LeafEntry, Manifest
from zfunc.core.errors import CheckpointError
from zfunc.core.mesh import Mesh

PATHS_SHOWN = 8


def check_replicas(
    mesh: Mesh, what: str, manifest: Manifest, buffers: Mapping[str, torch.Tensor]
) -> None:
    """Raise on every rank if two ranks hold different bits of the same piece of a leaf.

    One hash per group of leaves that share a layout travels; a hash per leaf only to
    name the culprits. Metrics are reports, and are not compared.

    Raises:
      CheckpointError: with the leaves' paths and the ranks.
    """
    if mesh.size == 1:
        return

    def work() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        hashes = _leaf_hashes(mesh, manifest, buffers)
        return hashes, {piece: _combined(leaves) for piece, leaves in hashes.items()}

    hashes, reports = agree(mesh, what, work)
    odd = _odd_ranks(reports)
    if not odd:
        return
    mine = {piece: leaves for piece, leaves in hashes.items() if piece in odd}
    details = agree(mesh, what, lambda: (None, mine)).reports
    lines = []
    for piece, (first, other) in odd.items():
        one, two = details[first][piece], details[other][piece]
        paths = [path for path in one if one[path] != two[path]]
        lines += [f"  ranks {first} and {other}: {p}" for p in paths[:PATHS_SHOWN]]
    raise CheckpointError(
        "\n".join([f"{what}: copies of one value differ between ranks:", *lines])
        + "\nThe ranks have diverged (a damaged memory, or an update that depends on "
        "the rank): restore an older checkpoint."
    )


def _combined(hashes: dict[str, str]) -> str:
    return hashlib.sha256("".join(hashes.values()).encode()).hexdigest()


def _leaf_hashes(
    mesh: Mesh, manifest: Manifest, buffers: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, str]]:
    """Hashes of the leaves that other ranks hold too, by piece and path."""
    places = coordinates(mesh.axes, int(mesh.rank))
    found: dict[str, dict[str, str]] = {}
    for leaf in manifest.leaves:
        if leaf.path.startswith(METRICS_PREFIX) or not _is_replicated(leaf, mesh):
            continue
        digest = hashlib.sha256(tensor_bytes(buffers[leaf.path])).hexdigest()
        piece = ",".join(f"{a}={places[a]}" for a in leaf.axes_of_dims if a is not None)
        found.setdefault(piece, {})[leaf.path] = digest
    return found


def _is_replicated(leaf: LeafEntry, mesh: Mesh) -> bool:
    return any(size > 1 and axis not in leaf.axes_of_dims for axis, size in mesh.axes)


def _odd_ranks(reports: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """The pieces on which two ranks differ, with the ranks."""
    first: dict[str, int] = {}
    odd: dict[str, tuple[int, int]] = {}
    for rank, report in enumerate(reports):
        for piece, digest in report.items():
            holder = first.setdefault(piece, rank)
            if reports[holder][piece] != digest:
                odd.setdefault(piece, (holder, rank))
    return odd
