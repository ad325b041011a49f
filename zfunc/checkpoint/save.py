# SPDX-License-Identifier: Apache-2.0
"""Saving: every rank writes its pieces, then one rename makes them a checkpoint."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zfunc.checkpoint.agree import Peers, agree, check_equal
from zfunc.checkpoint.draft import Draft, digests, drafted
from zfunc.checkpoint.files import (
    fsync_directory,
    make_directories,
    tensor_bytes,
    write_durably,
)
from zfunc.checkpoint.keep import REMOVED_PREFIX, Keep, check_keep, remove_before
from zfunc.checkpoint.leaves import mesh_of
from zfunc.checkpoint.manifest import (
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    dump_manifest,
    file_header,
    file_name,
    num_bytes,
    parse_manifest,
    read_manifest,
    sealed,
    stored_leaves,
)
from zfunc.checkpoint.replicas import check_replicas
from zfunc.checkpoint.running import wait_for_running
from zfunc.checkpoint.verify import check_directory, check_file
from zfunc.core.errors import CheckpointError
from zfunc.core.mesh import Mesh
from zfunc.core.state import TrainState, check_usable

TEMPORARY_PREFIX = ".tmp-"


def save(
    root: str | os.PathLike[str],
    state: TrainState,
    *,
    cursor: Any = None,
    meta: Mapping[str, Any] | None = None,
    keep: Keep | None = None,
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
      keep: which checkpoints in ``root`` stay once this one is on the disk; None
        removes none. Only steps before this one are removed.

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
      >>> import tempfile, torch
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
    check_keep(keep, "save")
    wait_for_running()
    draft = functools.partial(drafted, state, mesh, cursor, meta)
    return write_checkpoint(Path(root), Peers(mesh), draft, keep)


def write_checkpoint(
    folder: Path, peers: Peers, draft_of: Callable[[], Draft], keep: Keep | None
) -> Path:
    """Write what is drafted, then remove what is old; every rank calls it.

    Raises:
      CheckpointError: as ``save``, on every rank.
    """
    mesh, what = peers.mesh, f"saving in {folder}"
    with _removed_at_the_end() as leftovers:

        def prepare() -> tuple[Draft, dict[str, str]]:
            draft = draft_of()
            if mesh.rank == 0:
                leftovers.append(_prepare(folder, draft))
            return draft, digests(draft, keep)

        draft, reports = agree(peers, what, prepare)
        check_equal(reports, what)
        check_replicas(peers, what, draft.manifest, draft.buffers)
        files = agree(peers, what, lambda: _write(folder, draft, mesh)).reports
        made = agree(peers, what, lambda: _commit(folder, draft, files, mesh)).result

    def remove() -> tuple[None, None]:
        if keep is not None and mesh.rank == 0:
            remove_before(folder, keep, draft.manifest.step)
        return None, None

    if keep is not None:
        agree(peers, what, remove)
    return made


@contextlib.contextmanager
def _removed_at_the_end() -> Iterator[list[Path]]:
    """A list for directories that are not to outlive the block, however it ends."""
    leftovers: list[Path] = []
    try:
        yield leftovers
    finally:
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)


def _prepare(folder: Path, draft: Draft) -> Path:
    """The empty temporary directory, where no other one is."""
    _check_free(folder, draft)
    path = folder / f"{TEMPORARY_PREFIX}{draft.name}"
    try:
        make_directories(folder)
        for prefix in (TEMPORARY_PREFIX, REMOVED_PREFIX):
            for old in folder.glob(f"{prefix}step-*"):
                shutil.rmtree(old)
        os.mkdir(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot make this directory: {error.strerror or error}. Give a "
            "root that every rank can write to."
        ) from error
    return path


def _check_free(folder: Path, draft: Draft) -> None:
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


def _write(folder: Path, draft: Draft, mesh: Mesh) -> tuple[None, dict[str, Any]]:
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
    folder: Path, draft: Draft, files: list[dict[str, Any]], mesh: Mesh
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
    if len(text) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{where}: {len(text)} bytes, a manifest has at most {MAX_MANIFEST_BYTES}: "
            "give less meta, or a tree of fewer leaves."
        )
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
