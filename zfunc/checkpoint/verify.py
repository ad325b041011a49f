# SPDX-License-Identifier: Apache-2.0
"""Is this checkpoint whole, and of this model? Asked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from zfunc.checkpoint.damage import DamagedError
from zfunc.checkpoint.files import open_regular, sha256_of
from zfunc.checkpoint.manifest import (
    MANIFEST_NAME,
    LeafEntry,
    Manifest,
    file_header,
    num_bytes,
    stored_leaves,
)
from zfunc.core.errors import CheckpointError

DIFFERENCES_SHOWN = 8
NAMES_SHOWN = 8
MOMENTS_PREFIX = "moments/"
SCALE_PREFIX = "loss_scale"


def check_directory(directory: Path, manifest: Manifest) -> None:
    """The directory holds the files of the manifest and no other.

    Raises:
      DamagedError: with the names that are missing or too many.
    """
    expected = {MANIFEST_NAME, *(file.name for file in manifest.files)}
    try:
        found = set(os.listdir(directory))
    except OSError as error:
        raise _unreadable(directory, error) from error
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        raise DamagedError(
            f"{directory}: missing {_some(missing)}. It is damaged: restore another "
            "step (see list_steps)."
        )
    if extra:
        raise DamagedError(
            f"{directory}: {_some(extra)} not in the manifest. Nothing but a "
            "checkpoint's own files may be in its directory: move them away."
        )


def check_file(directory: Path, manifest: Manifest, rank: int, *, hashed: bool) -> None:
    """The file of ``rank`` has the size, the header and the hash it must have.

    The header is compared with the only one that fits the manifest, so it is never
    parsed, however long it claims to be.

    Raises:
      DamagedError: with the file's path, the expected and what was found.
    """
    entry = manifest.files[rank]
    path = directory / entry.name
    header = file_header(manifest, rank)
    data_bytes = sum(map(num_bytes, stored_leaves(manifest, rank)))
    if len(header) + data_bytes != entry.size_bytes:
        raise DamagedError(
            f"{directory / MANIFEST_NAME}: gives {entry.name} {entry.size_bytes} "
            f"bytes, but its leaves take {len(header) + data_bytes}. It is damaged."
        )
    try:
        with open_regular(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            start = file.read(len(header))
    except FileNotFoundError:
        raise DamagedError(f"{path}: missing. The checkpoint is damaged.") from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if size_bytes != entry.size_bytes:
        raise DamagedError(
            f"{path}: {size_bytes} bytes, expected {entry.size_bytes}. It is damaged: "
            "restore another step (see list_steps)."
        )
    if start != header:
        raise DamagedError(
            f"{path}: its safetensors header is not that of rank {rank} at step "
            f"{manifest.step} (names, shapes or dtypes). It is damaged, or of another "
            "checkpoint."
        )
    if hashed and _hash(path) != entry.sha256:
        raise DamagedError(
            f"{path}: its sha256 differs from the manifest's, though the size is "
            "right. It is damaged: restore another step (see list_steps)."
        )


def _hash(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DamagedError:
    return DamagedError(f"{path}: cannot be read: {error.strerror or error}.")


def check_same_model(
    where: Path, stored: Mapping[str, LeafEntry], wanted: Mapping[str, LeafEntry]
) -> None:
    """The checkpoint has the leaves that are wanted, in their shapes and dtypes.

    Raises:
      CheckpointError: with the paths that differ, expected against got.
    """
    missing = [path for path in wanted if path not in stored]
    extra = [path for path in stored if path not in wanted]
    changed = [
        f"{path}: expected {_shown(wanted[path])}, got {_shown(stored[path])}"
        for path in wanted
        if path in stored and _shown(wanted[path]) != _shown(stored[path])
    ]
    if not (missing or extra or changed):
        return
    lines = [f"{where}: the checkpoint does not fit `like`:"]
    lines += [f"  missing in the checkpoint: {line}" for line in _first(missing)]
    lines += [f"  only in the checkpoint: {line}" for line in _first(extra)]
    lines += [f"  {line}" for line in _first(changed)]
    raise CheckpointError("\n".join([*lines, _remedy(stored, wanted, changed)]))


def _shown(leaf: LeafEntry) -> str:
    return f"{leaf.dtype} {list(leaf.global_shape)}"


def _first(lines: list[str]) -> list[str]:
    hidden = len(lines) - DIFFERENCES_SHOWN
    return lines[:DIFFERENCES_SHOWN] + (
        [f"... and {hidden} more"] if hidden > 0 else []
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:NAMES_SHOWN]))
    hidden = len(names) - NAMES_SHOWN
    return f"{shown} and {hidden} more" if hidden > 0 else shown


def _remedy(
    stored: Mapping[str, LeafEntry], wanted: Mapping[str, LeafEntry], changed: list[str]
) -> str:
    has = any(path.startswith(MOMENTS_PREFIX) for path in stored)
    wants = any(path.startswith(MOMENTS_PREFIX) for path in wanted)
    if has and not wants:
        return (
            "The checkpoint has an optimizer's moments: make `like` with them, "
            "zf.shard(params, mesh, tx=tx)."
        )
    if wants and not has:
        return (
            "The checkpoint has no moments (saved before the first step, without tx=): "
            "make `like` without tx=, zf.shard(params, mesh)."
        )
    if any(path.startswith(SCALE_PREFIX) for path in stored.keys() ^ wanted.keys()):
        return (
            "They differ in the loss scale: make `like` with that of the step, "
            "like.replace(loss_scale=step.loss_scale_of(like)), or without one, "
            "like.replace(loss_scale=None)."
        )
    if changed:
        return (
            "Make `like` of the same model: zf.shard(params, mesh, tx=tx, dtype=...); "
            "nothing is cast or cut on the way."
        )
    return "Make `like` of the same model and optimizer: zf.shard(params, mesh, tx=tx)."
