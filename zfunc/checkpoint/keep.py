# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints stay, and removing the others so that none is ever half there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zfunc.checkpoint.damage import DamagedError
from zfunc.checkpoint.files import fsync_directory
from zfunc.checkpoint.find import list_steps
from zfunc.checkpoint.manifest import read_manifest, step_name
from zfunc.checkpoint.verify import check_directory, check_file
from zfunc.core.errors import CheckpointError

REMOVED_PREFIX = ".tmp-removed-"


@dataclass(frozen=True)
class Keep:
    r"""The checkpoints that stay: the newest ones, and every so many steps one.

    With newest steps :math:`s_1 > s_2 > \dots` those of
    :math:`\{s_1, \dots, s_{last}\} \cup \{s_i : every \mid s_i\}` stay. The newest
    always does.

    Args:
      last: how many of the newest stay.
      every: steps that are a multiple of it stay too; None adds none.

    Raises:
      ValueError: a number less than 1.
      TypeError: something that is not an int.

    Example:
      >>> sorted(Keep(last=2, every=10).kept([5, 10, 15, 20, 25, 30, 35]))
      [10, 20, 30, 35]
    """

    last: int = 1
    every: int | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("last", "every"):
            value = getattr(self, name)
            if value is None and name == "every":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Keep: {name} is an int, got {value!r}; type {name}=1")
            if value < 1:
                raise ValueError(
                    f"Keep: {name} is {value}, expected at least 1; type {name}=1"
                )

    def kept(self, steps: Iterable[int]) -> frozenset[int]:
        """The steps that stay, of these."""
        ordered = sorted(steps)
        multiples = [s for s in ordered if self.every and s % self.every == 0]
        return frozenset(ordered[-self.last :]).union(multiples)


def check_keep(keep: object, what: str) -> None:
    """Raise where ``keep`` is neither None nor a ``Keep``.

    Example:
      >>> check_keep(3, "save")
      Traceback (most recent call last):
      TypeError: save: keep is 3, expected None or a Keep; type for example \
keep=zf.checkpoint.Keep(last=3)
    """
    if keep is not None and not isinstance(keep, Keep):
        raise TypeError(
            f"{what}: keep is {keep!r}, expected None or a Keep; type for example "
            "keep=zf.checkpoint.Keep(last=3)"
        )


def remove_old(root: str | os.PathLike[str], keep: Keep) -> tuple[int, ...]:
    """Remove the checkpoints in ``root`` that are not to stay.

    First the newest whole checkpoint is looked for, every byte of it read and hashed;
    newer ones, which are damaged, are neither counted nor removed. ``save`` and
    ``save_async`` do the same after each save if they are given ``keep=``, without
    reading: the one that they wrote is whole.

    Args:
      root: where ``save`` puts checkpoints. One process calls this, while nobody
        saves or restores there.
      keep: what stays.

    Returns:
      The steps that were removed, ascending.

    Raises:
      CheckpointError: none of them is whole (then nothing is removed), or a directory
        cannot be removed.

    Laws: the newest whole checkpoint stays; a process or machine that dies at any
    moment leaves each checkpoint whole, or without its name.

    Differs from DeepSpeed: it has no such option.

    Example:
      >>> import tempfile, torch
      >>> from zfunc.checkpoint import save
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> state = shard({"w": torch.ones(2)}, make_mesh({}))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     for step in range(4):
      ...         _ = save(folder, state.replace(step=state.step + step))
      ...     remove_old(folder, Keep(last=2))
      (0, 1)
    """
    check_keep(keep, "remove_old")
    folder = Path(root)
    steps = list_steps(folder)
    reasons = []
    for step in reversed(steps):
        try:
            check_whole(folder / step_name(step))
        except DamagedError as error:
            reasons.append(f"  {error}")
            continue
        return remove_before(folder, keep, step)
    if reasons:
        raise CheckpointError(
            "\n".join([f"{folder}: no checkpoint is whole, none is removed:", *reasons])
        )
    return ()


def check_whole(directory: Path) -> None:
    """Every file of a checkpoint is what its manifest says.

    Raises:
      DamagedError: with the file.
    """
    manifest, _ = read_manifest(directory)
    check_directory(directory, manifest)
    for rank in range(manifest.num_ranks):
        check_file(directory, manifest, rank, hashed=True)


def remove_before(folder: Path, keep: Keep, newest: int) -> tuple[int, ...]:
    """Remove what is not to stay of the steps up to ``newest``, which is whole.

    A directory first loses the name by which it counts, durably, then its files: one
    that is half removed is never taken for a checkpoint. Later steps, of a training
    that took another way from here, are not touched.
    """
    steps = [step for step in list_steps(folder) if step <= newest]
    removed = sorted(set(steps) - keep.kept(steps) - {newest})
    doomed = []
    try:
        for step in removed:
            name = step_name(step)
            doomed.append(folder / f"{REMOVED_PREFIX}{name}")
            if os.path.lexists(doomed[-1]):  # of a removal that was killed
                shutil.rmtree(doomed[-1])
            os.rename(folder / name, doomed[-1])
        if doomed:
            fsync_directory(folder)
        for path in doomed:
            shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(
            f"{folder / step_name(newest)} is saved, but an older checkpoint cannot be "
            f"removed: {error.filename or folder}: {error.strerror or error}."
        ) from error
    return tuple(removed)
