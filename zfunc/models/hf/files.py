# SPDX-License-Identifier: Apache-2.0
"""The safetensors files of a checkpoint directory, read slice by slice."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.layout import Region

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: where it is, and its shape."""

    file: Path
    key: str
    shape: tuple[int, ...]

    def read(self, region: Region | None = None) -> torch.Tensor:
        """The tensor, or the part of it in a region: other bytes are not read.

        A copy: what safetensors gives is the file itself, mapped into memory, and
        would change with it.
        """
        with safe_open(self.file, framework="pt") as opened:
            if not region:
                return opened.get_tensor(self.key).clone()  # type: ignore[no-any-return]
            part = opened.get_slice(self.key)[tuple(slice(*ends) for ends in region)]
            return part.clone()  # type: ignore[no-any-return]


def stored_in(directory: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint directory by name.

    Raises:
      ModelError: no safetensors file, a file that is missing or damaged.
    """
    found: dict[str, Stored] = {}
    for file in _files(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (not a mapping)
                    shape = tuple(opened.get_slice(key).get_shape())
                    found[key] = Stored(file, key, shape)
        except Exception as error:  # safetensors has an error class of its own
            raise ModelError(
                f"{file}: cannot be read as safetensors: {error}. It is incomplete or "
                "damaged: get it again."
            ) from error
    return found


def _files(directory: Path) -> list[Path]:
    whole, index = directory / _WHOLE, directory / _INDEX
    if whole.is_file():
        return [whole]
    if not index.is_file():
        pickled = sorted(p.name for kind in _PICKLED for p in directory.glob(kind))
        remedy = (
            f"it has {pickled[0]}, a pickle, which can run code when it is read: "
            "convert it once, where you trust it, with transformers' "
            "AutoModel...from_pretrained(directory).save_pretrained(new_directory)."
            if pickled
            else "give the directory that save_pretrained wrote, or for random weights "
            "pass the config: transformers.AutoConfig.from_pretrained(directory)."
        )
        raise ModelError(f"{directory} has no {_WHOLE} and no {_INDEX}: {remedy}")
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()), key=str)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index}: is no index of safetensors files: {error}"
        ) from error
    outside = [n for n in names if not isinstance(n, str) or Path(n).name != n]
    if outside:
        raise ModelError(
            f"{index} lists {outside[0]!r}, which is not a file beside it."
        )
    missing = [n for n in names if not (directory / n).is_file()]
    if missing:
        raise ModelError(
            f"{index} lists {missing[0]} and {len(names)} files in all; {len(missing)} "
            "are not in the directory: get the whole checkpoint."
        )
    return [directory / name for name in names]


def described(
    error: list[tuple[str, list[str]]], directory: Any, cls: str
) -> ModelError:
    """One error with all that does not fit."""
    lines = [f"{directory} does not hold the weights of {cls}:"]
    for what, names in error:
        lines += [f"  {what}: {name}" for name in names[:8]]
        if len(names) > 8:
            lines.append(f"  {what}: {len(names) - 8} more")
    lines.append(
        "Pass the task or class that was saved, new=[patterns] for parameters that are "
        "to be initialised, and ignore=[patterns] for stored ones that are not needed."
    )
    return ModelError("\n".join(lines))
