# SPDX-License-Identifier: Apache-2.0
"""The newest checkpoint that is whole, and what is wrong with newer ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from zfunc.checkpoint.agree import Peers, agree
from zfunc.checkpoint.damage import DamagedError
from zfunc.checkpoint.find import step_directories
from zfunc.checkpoint.leaves import mesh_of
from zfunc.checkpoint.restore import Restored, restore
from zfunc.checkpoint.running import wait_for_running
from zfunc.core.errors import CheckpointError
from zfunc.core.state import TrainState, check_usable


class Damage(NamedTuple):
    """A checkpoint that was passed over, and why.

    Example:
      >>> Damage(Path("root/step-00000042"), "manifest.json: missing").path.name
      'step-00000042'
    """

    path: Path
    why: str


class Newest(NamedTuple):
    """What ``restore_newest`` found.

    ``damaged`` are the newer directories that it passed over, newest first: say so.

    Example:
      >>> Newest(Path("root/step-00000042"), Restored(None, None, {}), ()).damaged
      ()
    """

    path: Path
    restored: Restored
    damaged: tuple[Damage, ...]


def restore_newest(
    root: str | os.PathLike[str], like: TrainState, *, verify: bool = True
) -> Newest:
    """``restore`` of the newest checkpoint that is whole; damaged ones are passed over.

    Only damage is passed over (a file that is missing, too many, cut off, changed or
    not readable): a checkpoint of another model or of another version of the format is
    an error, as is a rank that goes away.

    Args:
      root: where ``save`` puts checkpoints.
      like: as of ``restore``; every rank of its mesh calls.
      verify: as of ``restore``; False does not see damage within the tensors.

    Returns:
      ``Newest(path, restored, damaged)``. Nothing is moved or removed: a damaged step
      that the training comes to again has to be moved away before it is saved.

    Raises:
      CheckpointError: none is whole, with what is wrong with each; as ``restore``.

    Laws: on every rank the same; the step is that of the newest checkpoint for which
    ``restore`` raises no ``DamagedError``.

    Differs from DeepSpeed: its ``latest`` names one directory, and a load that fails
    there is the end.

    Example:
      >>> import tempfile, torch
      >>> from zfunc.checkpoint import save
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> state = shard({"w": torch.ones(2)}, make_mesh({}))
      >>> with tempfile.TemporaryDirectory() as root:
      ...     _ = save(root, state)
      ...     path = save(root, state.replace(step=state.step + 1))
      ...     (path / "manifest.json").unlink()
      ...     newest = restore_newest(root, state)
      ...     print(newest.path.name, [d.path.name for d in newest.damaged])
      step-00000000 ['step-00000001']
    """
    mesh = mesh_of(like, "restore_newest: like")
    check_usable(like)
    wait_for_running()  # it may remove what is listed here
    folder, what = Path(root), f"restoring the newest in {root}"

    def look() -> tuple[None, list[str]]:
        found = step_directories(folder) if mesh.rank == 0 else ()
        return None, [path.name for path in found]

    names = agree(Peers(mesh), what, look).reports[0]
    damaged: list[Damage] = []
    for name in names:
        try:
            restored = restore(folder / name, like, verify=verify)
        except DamagedError as error:
            damaged.append(Damage(folder / name, str(error)))
            continue
        return Newest(folder / name, restored, tuple(damaged))
    if damaged:
        lines = "".join(f"\n  {damage.why}" for damage in damaged)
        raise CheckpointError(f"{folder}: no checkpoint is whole:{lines}")
    raise CheckpointError(
        f"{folder}: there is no checkpoint. Give a root that save wrote to."
    )
