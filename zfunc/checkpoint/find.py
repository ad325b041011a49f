# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints there are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from zfunc.checkpoint.damage import OtherSchemaError
from zfunc.checkpoint.manifest import read_manifest, step_name
from zfunc.core.errors import CheckpointError


def list_steps(root: str | os.PathLike[str]) -> tuple[int, ...]:
    """The steps of the complete checkpoints in ``root``, ascending.

    Complete means a real directory ``step-00000042`` whose manifest parses and is of
    that step. Anything else is ignored: temporary directories of a save that was
    killed, other files. Data files are not read (``restore`` does).

    Args:
      root: where ``save`` puts checkpoints; it need not exist.

    Returns:
      Step numbers; () if there is no such directory.

    Raises:
      CheckpointError: ``root`` cannot be read, or holds a checkpoint of another version
        of the format. (To take that for an empty directory would start a training from
        scratch without a word.)

    Differs from DeepSpeed: there is no ``latest`` file that can be wrong.

    Example:
      >>> list_steps("a-directory-that-does-not-exist")
      ()
    """
    return tuple(sorted(step for step, _ in _complete(Path(root))))


def latest(root: str | os.PathLike[str]) -> Path | None:
    """The directory of the newest complete checkpoint in ``root``, None without one.

    See ``list_steps`` for what is complete and what is ignored.

    Args:
      root: where ``save`` puts checkpoints; it need not exist.

    Raises:
      CheckpointError: as ``list_steps``.

    Laws: after a crash at any moment of a ``save``, this is the checkpoint before it or
    the new one, whole. Of what is damaged later only the manifest is seen here:
    ``restore`` sees the rest, and ``restore_newest`` passes it over.

    Differs from DeepSpeed and torch DCP: found by looking, so there is no pointer that
    is updated before what it points to.

    Example:
      >>> import tempfile, torch
      >>> from zfunc.checkpoint import save
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> with tempfile.TemporaryDirectory() as root:
      ...     path = save(root, shard({"w": torch.ones(2)}, make_mesh({})))
      ...     print(latest(root) == path, path.name)
      True step-00000000
    """
    newest = next(_complete(Path(root)), None)
    return None if newest is None else newest[1]


def is_step_name(name: str) -> bool:
    """True for the name of a step directory, in its one spelling.

    Example:
      >>> is_step_name("step-00000042"), is_step_name("step-42")
      (True, False)
    """
    match = re.fullmatch(r"step-([0-9]{8,18})", name)
    return match is not None and name == step_name(int(match[1]))


def step_directories(root: Path) -> tuple[Path, ...]:
    """The directories with the name of a step, newest first, whatever is in them.

    Raises:
      CheckpointError: ``root`` cannot be read; one that does not exist is empty.

    Example:
      >>> step_directories(Path("a-directory-that-does-not-exist"))
      ()
    """
    try:
        with os.scandir(root) as entries:
            names = [
                entry.name
                for entry in entries
                if is_step_name(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise _cannot_look(root, error) from error
    return tuple(root / name for name in sorted(names, key=_step_of, reverse=True))


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def _cannot_look(root: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{root}: cannot look for checkpoints: {error.strerror or error}."
    )


def _complete(root: Path) -> Iterator[tuple[int, Path]]:
    """Complete checkpoints, newest first."""
    for path in step_directories(root):
        step = _step_of(path.name)
        try:
            complete = _is_complete(path, step)
        except OSError as error:
            raise _cannot_look(root, error) from error
        if complete:
            yield step, path


def _is_complete(directory: Path, step: int) -> bool:
    try:
        manifest, _ = read_manifest(directory)
    except OtherSchemaError:
        raise
    except (CheckpointError, FileNotFoundError, NotADirectoryError):
        return False
    return manifest.step == step and bool(manifest.files)
