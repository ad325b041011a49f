# SPDX-License-Identifier: Apache-2.0
"""Files that are on the disk when a function returns, and reading without surprises."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

import torch

from zfunc.checkpoint.damage import DamagedError
from zfunc.core.errors import CheckpointError


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading; a link, a pipe or a device is refused, not followed.

    Raises:
      FileNotFoundError, NotADirectoryError: there is none.
      DamagedError: it is not a regular file.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DamagedError(f"{path}: a symbolic link, not a file.") from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DamagedError(f"{path}: not a regular file.")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def fsync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: Path) -> None:
    """Make a directory and what is missing above it, durably."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        fsync_directory(directory.parent)


def write_durably(
    path: Path, size_bytes: int, chunks: Iterable[bytes | memoryview]
) -> str:
    """Write a new file, wait until it is on the disk, and return its sha256.

    The chunks are hashed on their way, so the hash is that of what was meant.

    Args:
      path: must not exist.
      size_bytes: the sum of the chunks' lengths, for the error.
      chunks: made one at a time; none is kept.

    Raises:
      CheckpointError: the file could not be written, with its path and size; if the
        disk is full, with the bytes that were free.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_durably(Path(folder, "a"), 2, [b"h", b"i"])[:8]
      '8f434346'
    """
    digest = hashlib.sha256()
    try:
        free_bytes = shutil.disk_usage(path.parent).free
        with open(path, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        hint = ""
        if isinstance(error, FileNotFoundError):
            hint = ". The root must be on a file system that all ranks share"
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = (
                f"; {free_bytes} bytes were free when it began. Make room, or keep "
                "fewer checkpoints (keep=zf.checkpoint.Keep(last=...))"
            )
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"{path}: cannot write {size_bytes} bytes: {reason}{hint}."
        ) from error
    return digest.hexdigest()


def tensor_bytes(x: torch.Tensor) -> memoryview:
    r"""The elements of a tensor as bytes, row-major; a copy only if it needs one.

    Example:
      >>> bytes(tensor_bytes(torch.tensor([1, 2], dtype=torch.int16)))
      b'\x01\x00\x02\x00'
    """
    flat = x.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def sha256_of(path: Path) -> str:
    """The sha256 of a regular file.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     made = write_durably(Path(folder, "a"), 2, [b"hi"])
      ...     sha256_of(Path(folder, "a")) == made
      True
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
