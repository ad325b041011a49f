# SPDX-License-Identifier: Apache-2.0
"""Folders as scripts for DeepSpeed name them, with a checkpoint of zfunc inside.

``save_dir/latest`` names the newest tag; ``save_dir/<tag>/step-00000042`` is what
``zfunc.checkpoint`` wrote: it restores on any number of ranks and at any stage.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from zfunc.checkpoint.files import fsync_directory
from zfunc.checkpoint.find import is_step_name
from zfunc.checkpoint.find import latest as newest_in
from zfunc.checkpoint.restore import Restored, restore
from zfunc.checkpoint.save import save
from zfunc.compat.errors import CompatError
from zfunc.core import collectives
from zfunc.core.mesh import Mesh
from zfunc.core.state import TrainState

LATEST = "latest"
_THEIRS = re.compile(
    r"(mp_rank_\d+_model_states|(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_\w+|layer_\d+.*"
    r"-model_states|expp_rank_\d+.*)\.pt$"
)


def write(
    folder: str | os.PathLike[str],
    tag: str,
    state: TrainState,
    meta: dict[str, Any],
    mesh: Mesh,
    *,
    save_latest: bool,
) -> Path:
    """Save under a tag, on every rank; what was there is replaced, when this is whole.

    Args:
      folder: The script's ``save_dir``.
      tag: A name, the same on every rank.
      state: Between steps.
      meta: JSON; comes back when it is read.
      mesh: Of the state.
      save_latest: Whether ``latest`` names this tag then.

    Raises:
      CompatError: A tag that is no name of a folder, or of one with other things in it.
      CheckpointError: What ``zfunc.checkpoint.save`` raises.
    """
    if tag != Path(tag).name or tag in ("", ".", "..", LATEST):
        raise CompatError(f"save_checkpoint: tag {tag!r} is not a name of a folder")
    root, draft = Path(folder) / tag, Path(folder) / f".{tag}.new"
    refuse_theirs(root)
    others = [name for name in _names(root) if not is_step_name(name)]
    if others:
        raise CompatError(
            f"save_checkpoint: {root} holds {others[0]!r}, which is no checkpoint and "
            "would be removed: give another tag or folder"
        )
    wait_for_all(mesh)  # until every rank has looked
    if mesh.rank == 0:  # of a process that died amid a save
        shutil.rmtree(draft, ignore_errors=True)
    wait_for_all(mesh)
    path = save(draft, state, meta={"tag": tag, **meta})
    if mesh.rank == 0:
        _put(draft, root)
        if save_latest:
            pointer = Path(folder) / f".{LATEST}.new"
            pointer.write_text(tag, encoding="utf-8")
            pointer.replace(Path(folder) / LATEST)
        fsync_directory(Path(folder))
    wait_for_all(mesh)
    return root / path.name


def _put(draft: Path, root: Path) -> None:
    """Give a whole folder its name; another that has it goes after that."""
    old = root.with_name(f".{root.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if root.exists():
        root.rename(old)
    draft.rename(root)
    shutil.rmtree(old, ignore_errors=True)


def read(
    folder: str | os.PathLike[str], tag: str | None, like: TrainState
) -> tuple[Path, Restored] | None:
    """What was saved under a tag; None, and a warning, where ``latest`` names none.

    Args:
      folder: The script's ``load_dir``.
      tag: None for the one that ``latest`` names.
      like: Placement, shapes and dtypes.

    Raises:
      CompatError: A checkpoint of DeepSpeed itself.
      CheckpointError: What ``zfunc.checkpoint.restore`` raises.
    """
    if tag is None:
        pointer = Path(folder) / LATEST
        if not pointer.is_file():
            refuse_theirs(Path(folder))
            warnings.warn(
                f"load_checkpoint: there is no {pointer}, so nothing was loaded: "
                "training starts from the first weights",
                stacklevel=3,
            )
            return None
        tag = pointer.read_text(encoding="utf-8").strip()
    root = Path(folder) / tag
    refuse_theirs(root)
    return newest_in(root) or root, restore(root, like)


def refuse_theirs(folder: str | os.PathLike[str]) -> None:
    """Raise where a folder holds a checkpoint that DeepSpeed itself wrote.

    Raises:
      CompatError: with how to take its weights over.
    """
    theirs = [name for name in _names(folder) if _THEIRS.match(name)]
    if theirs:
        raise CompatError(
            f"{folder} is a checkpoint of DeepSpeed ({theirs[0]}), which zfunc does "
            "not read: make a state dict of it with the zero_to_fp32.py that lies "
            "beside it, and load that into the model before zfunc.compat.initialize"
        )


def _names(folder: str | os.PathLike[str]) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def write_half(path: Path, module: torch.nn.Module, dtype: torch.dtype | None) -> None:
    """Write a module's state dict, its floating tensors cast.

    Args:
      path: ``.bin`` or ``.pt`` for torch.save, ``.safetensors`` for that.
      module: Holds its parameters.
      dtype: None casts none.
    """
    found = {
        name: x.to(dtype) if dtype is not None and x.is_floating_point() else x
        for name, x in module.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        # Shared tensors are written once per name, as they are stored by name.
        save_file({name: x.clone().contiguous() for name, x in found.items()}, path)
    else:
        torch.save(found, path)


def wait_for_all(mesh: Mesh) -> None:
    """Return when every rank has come here."""
    collectives.psum(torch.zeros(1, device=mesh.device), "data", mesh)
