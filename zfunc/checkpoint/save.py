# SPDX-License-Identifier: Apache-2.0
"""Saving: every rank writes its pieces, then one rename makes them a checkpoint."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zfunc.checkpoint.agree import agree, check_equal
from zfunc.checkpoint.files import (
    fsync_directory,
    make_directories,
    tensor_bytes,
    write_durably,
)
from zfunc.checkpoint.leaves import buffer_of, entry_of, mesh_of, named_leaves
from zfunc.checkpoint.manifest import (
    MANIFEST_NAME,
    METRICS_PREFIX,
    FileEntry,
    Manifest,
    dump_manifest,
    file_header,
    file_name,
    num_bytes,
    parse_manifest,
    read_manifest,
    sealed,
    step_name,
    stored_leaves,
    zfunc_version,
)
from zfunc.checkpoint.replicas import check_replicas
from zfunc.checkpoint.skeleton import plain_ints, skeleton_of
from zfunc.checkpoint.verify import check_directory, check_file
from zfunc.core.errors import CheckpointError
from zfunc.core.mesh import Mesh
from zfunc.core.state import TrainState, check_usable

TEMPORARY_PREFIX = ".tmp-"


class _Draft(NamedTuple):
    """A checkpoint before it is written: a manifest without files, and tensors."""

    manifest: Manifest
    buffers: dict[str, torch.Tensor]

    @property
    def name(self) -> str:
        return step_name(self.manifest.step)


def save(
    root: str | os.PathLike[str],
    state: TrainState,
    *,
    cursor: Any = None,
    meta: Mapping[str, Any] | None = None,
) -> Path:
    r"""Write ``root/step-00000042``: all of the state, or nothing that counts.

    Every rank writes one safetensors file with its pieces into ``root/.tmp-step-...``
    and waits until they are on the disk; when all have, rank 0 writes the manifest (a
    sha256 of every file) and renames the directory. A process or a machine that dies
    at any moment leaves the older checkpoints whole and at most a temporary directory,
    which the next save removes. Equal states give equal bytes. :math:`\Psi` parameters
    with gradients and two moments are :math:`16 \Psi` bytes in float32, :math:`1/n` of
    it per rank; at most one tensor is copied at a time.

    A checkpoint never changes. Saving the same state again returns the same path;
    another state of the same step is refused, so a training that goes back and takes
    another way needs another root.

    Args:
      root: a directory on a file system that all ranks share, made if missing. One
        training at a time saves there.
      state: as ``zf.shard`` or a step returned it; every rank of its mesh calls.
      cursor: where the data is: a named tuple, dataclass, list or dictionary of
        integers, the same on every rank.
      meta: anything that is JSON, the same on every rank.

    Returns:
      The step's directory, on every rank and after every rank is done.

    Raises:
      CheckpointError: on every rank if one rank could not write (with the path and the
        bytes), if the ranks disagree, or if the step exists with other contents; a
        state without values (simulated, abstract), a leaf that cannot be stored.
      DonatedBufferError: a state that a donating step has consumed.

    Laws: ``restore(save(root, s), like=s).state == s`` bitwise; the older checkpoints
    restore whatever happens.

    Differs from torch DCP: never in place, every byte is covered by a hash, nothing is
    pickled, ranks that hold different values of a replicated leaf are an error.
    Differs from DeepSpeed: one format for all stages and mesh sizes.

    Example:
      >>> import tempfile
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> state = shard({"w": torch.ones(2)}, make_mesh({"data": 1}))
      >>> with tempfile.TemporaryDirectory() as root:
      ...     path = save(root, state, meta={"run": 7})
      ...     print(path.name, sorted(file.name for file in path.iterdir()))
      step-00000000 ['manifest.json', 'rank-00000.safetensors']
    """
    mesh = mesh_of(state, "save: state")
    check_usable(state)
    folder = Path(root)
    what = f"saving in {folder}"
    with _removed_at_the_end() as leftovers:

        def prepare() -> tuple[_Draft, dict[str, str]]:
            draft = _draft(state, mesh, cursor, meta)
            if mesh.rank == 0:
                leftovers.append(_prepare(folder, draft))
            return draft, _digests(draft.manifest)

        draft, reports = agree(mesh, what, prepare)
        check_equal(reports, what)
        check_replicas(mesh, what, draft.manifest, draft.buffers)
        files = agree(mesh, what, lambda: _write(folder, draft, mesh)).reports
        return agree(mesh, what, lambda: _commit(folder, draft, files, mesh)).result


@contextlib.contextmanager
def _removed_at_the_end() -> Iterator[list[Path]]:
    """A list for directories that are not to outlive the block, however it ends."""
    leftovers: list[Path] = []
    try:
        yield leftovers
    finally:
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)


def _draft(
    state: TrainState, mesh: Mesh, cursor: Any, meta: Mapping[str, Any] | None
) -> _Draft:
    leaves = named_leaves(state)
    try:
        position = plain_ints(cursor)
    except TypeError as error:
        raise CheckpointError(f"save: {error}") from None
    manifest = Manifest(
        schema_version=1,
        zfunc_version=zfunc_version(),
        step=int(state.step),
        key=int(state.key),
        mesh=mesh.axes,
        cursor=position,
        meta=_plain_meta(meta),
        aux=skeleton_of(state.metrics.aux, f"{METRICS_PREFIX}aux"),
        leaves=tuple(entry_of(path, leaf) for path, leaf in leaves.items()),
    )
    return _Draft(manifest, {path: buffer_of(leaf) for path, leaf in leaves.items()})


def _plain_meta(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    """A copy that is JSON; what would come back as something else is refused."""
    given = {} if meta is None else dict(meta)
    try:
        text = json.dumps(given, allow_nan=False, ensure_ascii=False).encode()
        same = json.loads(text) == given
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"save: meta is not JSON: {error}") from None
    if not same:
        raise CheckpointError(
            "save: meta would not come back as it is: use lists for tuples and strings "
            f"for keys; got {given!r:.200}"
        )
    return json.loads(text)  # type: ignore[no-any-return]


def _digests(manifest: Manifest) -> dict[str, str]:
    """What the ranks must agree about, by field."""
    fields = manifest.model_dump(mode="json", exclude={"files"})
    return {
        name: hashlib.sha256(json.dumps(value).encode()).hexdigest()
        for name, value in fields.items()
    }


def _prepare(folder: Path, draft: _Draft) -> Path:
    """The empty temporary directory, where no other one is."""
    _check_free(folder, draft)
    path = folder / f"{TEMPORARY_PREFIX}{draft.name}"
    try:
        make_directories(folder)
        for old in folder.glob(f"{TEMPORARY_PREFIX}step-*"):
            shutil.rmtree(old)
        os.mkdir(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot make this directory: {error.strerror or error}. Give a "
            "root that every rank can write to."
        ) from error
    return path


def _check_free(folder: Path, draft: _Draft) -> None:
    """Refuse to replace a checkpoint before anything is written."""
    final = folder / draft.name
    if not os.path.lexists(final):
        return
    try:
        manifest, _ = read_manifest(final)
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"{final}: exists and is not a complete checkpoint: {error}\n"
            "Move it away, or save to another root."
        ) from None
    as_draft = {"files": (), "manifest_sha256": ""}
    if manifest.model_copy(update=as_draft) != draft.manifest:
        raise _taken(final)


def _taken(final: Path) -> CheckpointError:
    return CheckpointError(
        f"{final}: a checkpoint of this step with other contents exists, and "
        "checkpoints never change: save to another root, or move it away."
    )


def _write(folder: Path, draft: _Draft, mesh: Mesh) -> tuple[None, dict[str, Any]]:
    """This rank's file."""
    rank = int(mesh.rank)
    name = file_name(rank)
    header = file_header(draft.manifest, rank)
    leaves = stored_leaves(draft.manifest, rank)
    size_bytes = len(header) + sum(map(num_bytes, leaves))

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for leaf in leaves:
            yield tensor_bytes(draft.buffers[leaf.path])

    path = folder / f"{TEMPORARY_PREFIX}{draft.name}" / name
    sha256 = write_durably(path, size_bytes, chunks())
    return None, {"name": name, "size_bytes": size_bytes, "sha256": sha256}


def _commit(
    folder: Path, draft: _Draft, files: list[dict[str, Any]], mesh: Mesh
) -> tuple[Path, None]:
    """Rank 0: write the manifest and give the directory its name."""
    final = folder / draft.name
    if mesh.rank != 0:
        return final, None
    entries = tuple(FileEntry(**file) for file in files)
    manifest = sealed(draft.manifest.model_copy(update={"files": entries}))
    text = dump_manifest(manifest)
    temporary = folder / f"{TEMPORARY_PREFIX}{draft.name}"
    where = temporary / MANIFEST_NAME
    if parse_manifest(text, where) != manifest:
        raise CheckpointError(f"{where}: this state's manifest does not read back.")
    if os.path.lexists(final):
        _check_identical(final, text, manifest)
        fsync_directory(folder)  # the save that made it may have failed just there
        return final, None
    write_durably(where, len(text), [text])
    try:
        fsync_directory(temporary)
        os.rename(temporary, final)
        fsync_directory(folder)
    except OSError as error:
        total_bytes = len(text) + sum(entry.size_bytes for entry in entries)
        raise CheckpointError(
            f"{final}: cannot commit {total_bytes} bytes: {error.strerror or error}."
        ) from error
    return final, None


def _check_identical(final: Path, text: bytes, manifest: Manifest) -> None:
    """The checkpoint that exists is this one, and undamaged."""
    if read_manifest(final)[1] != text:
        raise _taken(final)
    check_directory(final, manifest)
    for rank in range(manifest.num_ranks):
        check_file(final, manifest, rank, hashed=True)
