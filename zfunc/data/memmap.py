# SPDX-License-Identifier: Apache-2.0
"""Token ids in a flat little-endian file: written atomically, read through a map."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .datasets import StrPath, check_window

DtypeName = Literal["uint8", "uint16", "uint32", "int32", "int64"]


class MemmapTokens:
    """A flat file of little-endian token ids, mapped and not read.

    The format has no header: it is nanoGPT's ``train.bin``, and what ``write_tokens``
    writes. Memory use is the pages being read. Ids are checked as they are read, so
    opening costs nothing however large the file is.

    Args:
      path: The file.
      vocab_size: Every id must be below it; the model's vocabulary.
      dtype: How an id is stored.

    Raises:
      FileNotFoundError: ``path`` does not exist.
      ValueError: ``path`` is unreadable, empty or not a whole number of ids; or, from
        ``window``, an id is not in ``[0, vocab_size)``.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_tokens(folder + "/t.bin", [3, 1, 4, 1, 5], "uint16")
      ...     MemmapTokens(folder + "/t.bin", vocab_size=10).window(1, 3)
      tensor([1, 4, 1])
    """

    def __init__(
        self, path: StrPath, vocab_size: int, dtype: DtypeName = "uint16"
    ) -> None:
        self.path = Path(path)
        self.vocab_size = vocab_size
        stored = _little_endian(dtype)
        try:
            with self.path.open("rb") as file:
                num_bytes = file.seek(0, os.SEEK_END)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"MemmapTokens: {path}: no such file; write it with write_tokens"
            ) from error
        except OSError as error:
            raise ValueError(
                f"MemmapTokens: {path}: cannot be read ({error.strerror}), expected a "
                "readable file; check the path and its permissions"
            ) from error
        if num_bytes == 0 or num_bytes % stored.itemsize:
            raise ValueError(
                f"MemmapTokens: {path}: got {num_bytes} bytes, expected a positive "
                f"multiple of {stored.itemsize} for {dtype}; check dtype=, or write "
                "the file again with write_tokens"
            )
        self._ids = np.memmap(self.path, dtype=stored, mode="r")

    def __repr__(self) -> str:
        return f"MemmapTokens({self.path}, {len(self)} tokens)"

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self._ids)

    def window(self, start: int, length: int) -> Tensor:
        """The tokens ``[start, start + length)`` as int64 ``[length]``.

        Raises:
          ValueError: The window reaches outside the file, or an id in it is not in
            ``[0, vocab_size)``.
        """
        check_window(f"MemmapTokens: {self.path}", start, length, len(self))
        tokens = torch.from_numpy(self._ids[start : start + length].astype(np.int64))
        outside = (tokens < 0) | (tokens >= self.vocab_size)
        if outside.any():
            offset = int(outside.int().argmax())
            raise ValueError(
                f"MemmapTokens: {self.path}: token {start + offset} has id "
                f"{int(tokens[offset])}, expected 0 <= id < vocab_size="
                f"{self.vocab_size}; check vocab_size= and dtype="
            )
        return tokens


def write_tokens(
    path: StrPath,
    ids: Tensor | npt.NDArray[Any] | Sequence[int],
    dtype: DtypeName = "uint16",
) -> None:
    r"""Write token ids to a flat little-endian file, atomically.

    The ids go to a temporary name in the same folder, are flushed to the disk and
    renamed: after a crash ``path`` holds the old file or the new one, never a part.

    Args:
      path: The file; an existing one is replaced.
      ids: Integers, one-dimensional.
      dtype: How an id is stored; it must hold every id.

    Raises:
      FileNotFoundError: The folder of ``path`` does not exist.
      TypeError: The ids are not integers.
      ValueError: The ids are empty, not one-dimensional, or do not fit ``dtype``.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_tokens(folder + "/t.bin", [1, 256])
      ...     (Path(folder) / "t.bin").read_bytes()
      b'\x01\x00\x00\x01'
    """
    path = Path(path)
    array = np.asarray(ids.detach().cpu() if isinstance(ids, Tensor) else ids)
    stored = _little_endian(dtype)
    _check_ids(path, array, stored)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"write_tokens: {path}: the folder {path.parent} does not exist; make it "
            "first"
        )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            array.astype(stored).tofile(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _check_ids(path: Path, array: npt.NDArray[Any], stored: np.dtype[Any]) -> None:
    if array.ndim != 1 or array.size == 0:
        raise ValueError(
            f"write_tokens: {path}: got ids of shape {array.shape}, expected one "
            "dimension and at least one id; flatten them"
        )
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"write_tokens: {path}: got ids of dtype {array.dtype}, expected integers"
        )
    limits = np.iinfo(stored)
    low, high = int(array.min()), int(array.max())
    if low < max(limits.min, 0) or high > limits.max:
        raise ValueError(
            f"write_tokens: {path}: got ids in [{low}, {high}], expected them in "
            f"[0, {limits.max}] for {stored.name}; choose a wider dtype="
        )


def _little_endian(dtype: DtypeName) -> np.dtype[Any]:
    if dtype not in ("uint8", "uint16", "uint32", "int32", "int64"):
        raise ValueError(
            f"token dtype {dtype!r}: expected one of 'uint8', 'uint16', 'uint32', "
            "'int32', 'int64'"
        )
    return np.dtype(dtype).newbyteorder("<")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
