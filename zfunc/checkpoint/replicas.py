# SPDX-License-Identifier: Apache-2.0
"""Copies of one value on several ranks are equal, or nothing is saved.

A replicated leaf is stored once. If a bit flipped in one rank's copy, to store rank 0's
would pick a winner in silence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from zfunc.checkpoint.agree import Peers, agree
from zfunc.checkpoint.files import tensor_bytes
from zfunc.checkpoint.layout import coordinates
from zfunc.checkpoint.manifest import METRICS_PREFIX, LeafEntry, Manifest
from zfunc.core.errors import CheckpointError
from zfunc.core.mesh import Mesh

PATHS_SHOWN = 8


def check_replicas(
    peers: Peers, what: str, manifest: Manifest, buffers: Mapping[str, torch.Tensor]
) -> None:
    """Raise on every rank if two ranks hold different bits of the same piece of a leaf.

    One hash per group of leaves that share a layout travels; a hash per leaf only to
    name the culprits. Metrics are reports, and are not compared.

    Raises:
      CheckpointError: with the leaves' paths and the ranks.
    """
    mesh = peers.mesh
    if mesh.size == 1:
        return

    def work() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
        hashes = _leaf_hashes(mesh, manifest, buffers)
        return hashes, {piece: _combined(leaves) for piece, leaves in hashes.items()}

    hashes, reports = agree(peers, what, work)
    odd = _odd_pieces(reports)
    if not odd:
        return
    mine = {piece: leaves for piece, leaves in hashes.items() if piece in odd}
    details = agree(peers, what, lambda: (None, mine)).reports
    lines = [f"  {line}" for piece in odd for line in _culprits(piece, details)]
    hidden = len(lines) - PATHS_SHOWN
    lines = lines[:PATHS_SHOWN] + ([f"  ... and {hidden} more"] * (hidden > 0))
    raise CheckpointError(
        "\n".join([f"{what}: copies of one value differ between ranks:", *lines])
        + "\nThe ranks have diverged (a damaged memory, or an update that depends on "
        "the rank): restore an older checkpoint."
    )


def _culprits(piece: str, details: list[dict[str, dict[str, str]]]) -> Iterator[str]:
    """A line for each leaf that differs: the ranks of each value, the fewest first."""
    holders = [rank for rank, found in enumerate(details) if piece in found]
    for path in details[holders[0]][piece]:
        ranks: dict[str, list[int]] = {}
        for rank in holders:
            ranks.setdefault(details[rank][piece][path], []).append(rank)
        if len(ranks) > 1:
            groups = sorted(ranks.values(), key=lambda group: (len(group), -group[0]))
            yield f"{path}: {' differs from '.join(map(_named, groups))}"


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


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


def _odd_pieces(reports: list[dict[str, Any]]) -> list[str]:
    """The pieces of which two ranks hold different values."""
    first: dict[str, str] = {}
    odd: dict[str, None] = {}
    for report in reports:
        for piece, digest in report.items():
            if first.setdefault(piece, digest) != digest:
                odd[piece] = None
    return list(odd)
