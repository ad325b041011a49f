# SPDX-License-Identifier: Apache-2.0
"""Restoring: every rank reads the boxes that make up its pieces, on any mesh."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from zfunc.checkpoint.agree import Peers, agree, check_equal
from zfunc.checkpoint.damage import DamagedError
from zfunc.checkpoint.find import is_step_name, latest
from zfunc.checkpoint.layout import Source, held_region, sources
from zfunc.checkpoint.leaves import buffer_of, entry_of, mesh_of, named_leaves
from zfunc.checkpoint.manifest import (
    MANIFEST_NAME,
    METRICS_PREFIX,
    LeafEntry,
    Manifest,
    file_name,
    read_manifest,
)
from zfunc.checkpoint.running import wait_for_running
from zfunc.checkpoint.skeleton import rebuilt, skeleton_of
from zfunc.checkpoint.verify import check_directory, check_file, check_same_model
from zfunc.core.errors import CheckpointError
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import Sharded, is_sharded
from zfunc.core.state import Metrics, TrainState, check_usable
from zfunc.core.tree import (
    map_with_path,
    tree_structure,
    tree_unflatten,
)


class Restored(NamedTuple):
    """What a checkpoint holds.

    ``cursor`` is plain JSON, named fields as a dictionary (``Cursor(**cursor)`` makes
    one of it), None if none was saved.

    Example:
      >>> Restored(None, {"epoch": 0, "position": 96, "seed": 1}, {}).cursor["position"]
      96
    """

    state: TrainState
    cursor: Any
    meta: dict[str, Any]


class _Read(NamedTuple):
    """A box of a leaf to read: where from, where to."""

    path: str
    box: Source


def restore(
    path: str | os.PathLike[str], like: TrainState, *, verify: bool = True
) -> Restored:
    r"""Read a checkpoint into the placement of ``like``, whatever mesh saved it.

    First everything is checked: the manifest; that the leaves have the paths, shapes
    and dtypes of ``like``; that the directory holds its files and no other; every
    file's size, header and (``verify``) sha256, each file by one rank. Then each rank
    reads the parts of the files that overlap its pieces: about :math:`1/n` of the state
    on n ranks, never the whole. Nothing is cast, nothing is unpickled.

    Args:
      path: a step's directory, or a root: then its newest complete checkpoint.
      like: gives structure, placement and dtypes; its values are not used and do not
        change. ``zf.shard(params, mesh, tx=tx)`` makes one on any mesh, stage or spec.
      verify: hash the files (all bytes are read once, split over the ranks).

    Returns:
      ``Restored(state, cursor, meta)``. Metrics are as they were saved; those of
      ``like`` may differ. Named tuples in ``metrics.aux`` come back as dictionaries
      unless ``like`` has the same ones.

    Raises:
      DamagedError: on every rank, if one finds damage, with the file. An older step is
        not taken instead: ``restore_newest`` does that, and says so.
      CheckpointError: the checkpoint is of another model or optimizer (with all the
        paths); there is no checkpoint.

    Laws: ``restore(save(root, s), like=s).state == s`` bitwise, and a training that
    goes on from it gives the bits of one that was never interrupted; a checkpoint of
    mesh A restores on mesh B.

    Differs from torch DCP: a new state is returned, damage is found before anything is
    loaded, a dtype or shape that differs is an error. Differs from DeepSpeed: any
    number of ranks and any stage, without a conversion.

    Example:
      >>> import tempfile
      >>> from zfunc.checkpoint import save
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> mesh = make_mesh({"data": 1})
      >>> saved, like = (shard({"w": torch.full((2,), x)}, mesh) for x in (3.0, 0.0))
      >>> with tempfile.TemporaryDirectory() as root:
      ...     _ = save(root, saved)
      ...     restore(root, like).state.params["w"].buffer
      tensor([3., 3.])
    """
    mesh = mesh_of(like, "restore: like")
    check_usable(like)
    wait_for_running()  # it may remove what is read here
    given, peers = Path(path), Peers(mesh)
    what = f"restoring {given}"
    chosen = agree(peers, what, lambda: (None, _chosen(given, mesh))).reports[0]
    directory = given / chosen

    def check() -> tuple[Manifest, dict[str, str]]:
        manifest, text = _read_manifest(directory)
        check_same_model(directory, *_described(manifest, like))
        if mesh.rank == 0:
            check_directory(directory, manifest)
        for rank in range(int(mesh.rank), manifest.num_ranks, mesh.size):
            check_file(directory, manifest, rank, hashed=verify)
        return manifest, {MANIFEST_NAME: hashlib.sha256(text).hexdigest()}

    manifest, reports = agree(peers, what, check)
    check_equal(reports, what)
    load = agree(peers, what, lambda: (_load(directory, manifest, like, mesh), None))
    return Restored(load.result, manifest.cursor, manifest.meta)


def _chosen(path: Path, mesh: Mesh) -> str:
    """The step's directory below ``path``, as rank 0 sees it; "" for itself."""
    if mesh.rank != 0 or is_step_name(path.name) or (path / MANIFEST_NAME).exists():
        return ""
    newest = latest(path)
    if newest is None:
        state = "has no complete checkpoint" if path.is_dir() else "is not a directory"
        raise CheckpointError(
            f"{path}: {state}. Give a root that save wrote to, or a directory "
            "step-... in it (zf.checkpoint.latest(root) is None in this case)."
        )
    return newest.name


def _read_manifest(directory: Path) -> tuple[Manifest, bytes]:
    where = directory / MANIFEST_NAME
    try:
        manifest, text = read_manifest(directory)
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(
            f"{where}: missing, so {directory} is not a complete checkpoint."
        ) from None
    except OSError as error:
        raise DamagedError(f"{where}: cannot be read: {error.strerror}.") from error
    if not manifest.files:
        raise DamagedError(f"{directory / MANIFEST_NAME}: lists no files.")
    return manifest, text


def _described(
    manifest: Manifest, like: TrainState
) -> tuple[dict[str, LeafEntry], dict[str, LeafEntry]]:
    """Stored and wanted leaves without the metrics, which are restored as they are."""
    wanted = {p: entry_of(p, leaf) for p, leaf in named_leaves(like).items()}
    stored = {leaf.path: leaf for leaf in manifest.leaves}

    def others(entries: dict[str, LeafEntry]) -> dict[str, LeafEntry]:
        return {
            path: entry
            for path, entry in entries.items()
            if not path.startswith(METRICS_PREFIX)
        }

    return others(stored), others(wanted)


def _load(
    directory: Path, manifest: Manifest, like: TrainState, mesh: Mesh
) -> TrainState:
    wanted = named_leaves(like)
    device = like.metrics.loss.device
    reads: dict[int, list[_Read]] = {}
    buffers: dict[str, torch.Tensor] = {}
    for leaf in manifest.leaves:
        target = wanted.get(leaf.path)
        if leaf.path.startswith(METRICS_PREFIX):
            target = None
        region = _region(leaf, target, mesh)
        for box in sources(manifest.mesh, leaf.axes_of_dims, leaf.global_shape, region):
            reads.setdefault(box.rank, []).append(_Read(leaf.path, box))
        buffers[leaf.path] = _zeros(leaf, target, device)
    for rank, boxes in sorted(reads.items()):
        _read_boxes(directory / file_name(rank), boxes, buffers)
    state = _assembled(manifest, like, buffers)
    if int(state.step) != manifest.step:
        raise DamagedError(
            f"{directory}: the stored step is {int(state.step)}, the manifest's "
            f"{manifest.step}. It is damaged."
        )
    return state


def _region(leaf: LeafEntry, target: Any, mesh: Mesh) -> tuple[tuple[int, int], ...]:
    spec = target.sharding.spec if is_sharded(target) else ()
    return held_region(mesh.axes, spec, leaf.global_shape, int(mesh.rank))


def _zeros(leaf: LeafEntry, target: Any, device: torch.device) -> torch.Tensor:
    """The buffer to fill; what stays zero is padding."""
    shape = leaf.global_shape
    if is_sharded(target):
        shape = target.sharding.local_shape(shape)
    where = device if target is None else buffer_of(target).device
    return torch.zeros(shape, dtype=getattr(torch, leaf.dtype), device=where)


def _read_boxes(
    file: Path, boxes: list[_Read], buffers: Mapping[str, torch.Tensor]
) -> None:
    try:
        with safe_open(file, framework="pt") as opened:
            for path, (_, source, target) in boxes:
                if source:
                    buffers[path][target].copy_(opened.get_slice(path)[source])
                else:
                    buffers[path].copy_(opened.get_tensor(path))
    except Exception as error:  # safetensors has an error class of its own
        raise DamagedError(
            f"{file}: cannot be read: {error}. It is damaged, or changed just now."
        ) from error


def _assembled(
    manifest: Manifest, like: TrainState, buffers: Mapping[str, torch.Tensor]
) -> TrainState:
    def filled(path: str, leaf: Any) -> Any:
        if isinstance(leaf, Sharded):
            return dataclasses.replace(leaf, buffer=buffers[path])
        return buffers[path]

    state: TrainState = map_with_path(
        filled, like.replace(metrics=None), is_leaf=is_sharded
    )
    return state.replace(metrics=_metrics(manifest, like, buffers))


def _metrics(
    manifest: Manifest, like: TrainState, buffers: Mapping[str, torch.Tensor]
) -> Metrics:
    """The stored metrics; one that was not known when it was saved is that of like."""
    names = [field.name for field in dataclasses.fields(like.metrics)]
    stored = {n: buffers.get(METRICS_PREFIX + n) for n in names if n != "aux"}
    known = {name: value for name, value in stored.items() if value is not None}
    aux = like.metrics.aux
    if skeleton_of(aux, f"{METRICS_PREFIX}aux") == manifest.aux:
        found = [buffers[path] for path in manifest.aux.paths()]
        aux = tree_unflatten(tree_structure(aux), found)
    else:
        aux = rebuilt(manifest.aux, buffers)
    return dataclasses.replace(like.metrics, aux=aux, **known)
