# SPDX-License-Identifier: Apache-2.0
"""Datasets are flat sequences of token ids with random access to windows of them."""

import fnmatch
import math
import os
import stat
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn, Protocol

import torch
from torch import Tensor

StrPath = str | os.PathLike[str]

_TEXT_PATTERNS = ("*.py", "*.txt", "*.md", "*.rst", "*.toml", "*.json", "*.yaml")
_NOT_SOURCES: Final = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_CHUNK_TOKENS = 2**20


class TokenDataset(Protocol):
    """What a loader needs of a dataset; any object with these three will do."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; every id is below it."""
        ...

    def __len__(self) -> int:
        """Number of tokens."""
        ...

    def window(self, start: int, length: int) -> Tensor:
        """The tokens ``[start, start + length)`` as int64 ``[length]``."""
        ...


class ByteDataset:
    """The bytes of some files, one after the other: vocabulary 256, no tokenizer.

    The files are held in memory (one byte per token); use ``MemmapTokens`` for what
    does not fit. Nothing is put between two files.

    Args:
      source: A file; a folder, read recursively; or the files themselves, read in
        the order given.
      patterns: Names to read in a folder, as for ``fnmatch``. Files and folders
        whose name starts with a dot are skipped, links to folders are not followed,
        and the order is that of the sorted ``/``-separated relative paths, the same
        on every machine.
      max_bytes: Keep this many bytes from the front, all by default.

    Raises:
      FileNotFoundError: A path does not exist.
      ValueError: A path cannot be read, or there is no byte in what was found.

    Examples:
      >>> dataset = ByteDataset(standard_library_files()[:1], max_bytes=100)
      >>> len(dataset), dataset.vocab_size, dataset.window(0, 3).dtype
      (100, 256, torch.int64)
    """

    vocab_size = 256

    def __init__(
        self,
        source: StrPath | Iterable[StrPath],
        *,
        patterns: Iterable[str] = _TEXT_PATTERNS,
        max_bytes: int | None = None,
    ) -> None:
        if max_bytes is not None and max_bytes <= 0:
            raise ValueError(
                f"ByteDataset: max_bytes={max_bytes}, expected a positive number; "
                "leave it out to read everything"
            )
        if isinstance(source, str | os.PathLike):
            where, files = str(source), _find(Path(source), tuple(patterns))
        else:
            files = [Path(file) for file in source]
            where = f"the {len(files)} given files"
        data = _read(files, max_bytes)
        if not data:
            raise ValueError(
                f"ByteDataset: {where}: got 0 bytes in {len(files)} files, expected at "
                "least one; give the path of a file that is not empty"
            )
        self._where = where
        self._bytes = torch.frombuffer(data, dtype=torch.uint8)

    def __repr__(self) -> str:
        return f"ByteDataset({self._where}, {len(self)} tokens)"

    def __len__(self) -> int:
        """Number of bytes."""
        return len(self._bytes)

    def window(self, start: int, length: int) -> Tensor:
        """The bytes ``[start, start + length)`` as int64 ``[length]``.

        Raises:
          ValueError: The window reaches outside the dataset.
        """
        check_window("ByteDataset", start, length, len(self))
        return self._bytes[start : start + length].long()


@dataclass(frozen=True)
class TokenRange:
    """The tokens ``[start, stop)`` of a dataset, as a dataset; nothing is copied.

    Args:
      dataset: Where the tokens are.
      start: First token of the range.
      stop: One past its last token.

    Raises:
      ValueError: Not ``0 <= start < stop <= len(dataset)``.

    Examples:
      >>> part = TokenRange(ByteDataset(__file__), start=2, stop=6)
      >>> len(part), bytes(part.window(0, 4).tolist())
      (4, b'SPDX')
    """

    dataset: TokenDataset
    start: int
    stop: int

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not 0 <= self.start < self.stop <= len(self.dataset):
            raise ValueError(
                f"TokenRange: got start={self.start}, stop={self.stop}, expected "
                f"0 <= start < stop <= len(dataset)={len(self.dataset)}"
            )

    @property
    def vocab_size(self) -> int:
        """That of the whole dataset."""
        return self.dataset.vocab_size

    def __len__(self) -> int:
        """Number of tokens in the range."""
        return self.stop - self.start

    def window(self, start: int, length: int) -> Tensor:
        """The tokens ``[start, start + length)`` of the range, as int64 ``[length]``.

        Raises:
          ValueError: The window reaches outside the range.
        """
        check_window("TokenRange", start, length, len(self))
        return self.dataset.window(self.start + start, length)


def train_validation_split(
    dataset: TokenDataset, validation_fraction: float = 0.1
) -> tuple[TokenRange, TokenRange]:
    """Split a dataset into its front (train) and its back (validation).

    Contiguous, so that no window of one contains a token of the other. The back of
    a folder is its last files: their text may differ in kind from the front.

    Args:
      dataset: What to split.
      validation_fraction: Share of the tokens at the back, rounded down to tokens.

    Returns:
      ``(train, validation)``: every token is in exactly one of them.

    Raises:
      ValueError: The fraction leaves one of the two without a token.

    Examples:
      >>> dataset = ByteDataset(standard_library_files()[:1], max_bytes=100)
      >>> train, validation = train_validation_split(dataset, 0.2)
      >>> len(train), len(validation)
      (80, 20)
    """
    num_tokens = len(dataset)
    num_validation = int(num_tokens * validation_fraction)
    if not 0 < num_validation < num_tokens:
        raise ValueError(
            f"train_validation_split: validation_fraction={validation_fraction} of "
            f"{num_tokens} tokens gives {num_validation} validation tokens, expected "
            f"1 to {num_tokens - 1}; choose another fraction in (0, 1)"
        )
    boundary = num_tokens - num_validation
    return (
        TokenRange(dataset, 0, boundary),
        TokenRange(dataset, boundary, num_tokens),
    )


def unigram_entropy(dataset: TokenDataset) -> float:
    r"""Entropy of the token frequencies, :math:`-\sum_v p_v \log p_v`, in nats.

    The loss of the best model that ignores context: a model whose loss is not below
    it has learned nothing but frequencies.

    Args:
      dataset: Read once from front to back, in chunks.

    Returns:
      Nats per token, between 0 and ``log(vocab_size)``.

    Examples:
      >>> 2.0 < unigram_entropy(ByteDataset(__file__)) < 4.0
      True
    """
    counts = torch.zeros(dataset.vocab_size, dtype=torch.int64)
    for start in range(0, len(dataset), _CHUNK_TOKENS):
        length = min(_CHUNK_TOKENS, len(dataset) - start)
        tokens = dataset.window(start, length)
        counts = counts + torch.bincount(tokens, minlength=dataset.vocab_size)
    p = counts[counts > 0].double() / len(dataset)
    return math.fsum((-p * p.log()).tolist())


def standard_library_files() -> list[Path]:
    """The Python sources of the running interpreter's standard library, sorted.

    About 10 MB of text that every user has: enough for a demo with no download.
    Tests, installed packages and caches are left out.

    Returns:
      Paths of the ``*.py`` files, ordered by their path relative to the library.

    Raises:
      FileNotFoundError: The interpreter came without its sources.

    Examples:
      >>> "argparse.py" in [path.name for path in standard_library_files()]
      True
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = [
        path
        for path in root.rglob("*.py")
        if _NOT_SOURCES.isdisjoint(path.relative_to(root).parts) and path.is_file()
    ]
    if not found:
        raise FileNotFoundError(
            f"standard_library_files: {root}: got no *.py file, expected the sources "
            "of the standard library; give your own text, as in ByteDataset('path')"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def check_window(owner: str, start: int, length: int, num_tokens: int) -> None:
    """Raise unless a window lies inside a dataset.

    Args:
      owner: Name of the dataset, for the message.
      start: First token of the window.
      length: Number of tokens in it.
      num_tokens: Length of the dataset.

    Raises:
      ValueError: The window is empty or reaches outside.

    Examples:
      >>> check_window("ByteDataset", 0, 5, num_tokens=4)
      Traceback (most recent call last):
      ...
      ValueError: ByteDataset: window [0, 5) is not inside the 4 tokens
    """
    if start < 0 or length <= 0 or start + length > num_tokens:
        raise ValueError(
            f"{owner}: window [{start}, {start + length}) is not inside the "
            f"{num_tokens} tokens"
        )


def _find(root: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The file itself, or the matching files below a folder, in a fixed order."""
    try:
        mode = root.stat().st_mode
    except OSError as error:
        _unreadable(error)
    if not stat.S_ISDIR(mode):
        return [root]
    found = []
    for folder, folders, names in os.walk(root, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, name)
            for name in names
            if not name.startswith(".")
            and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        ]
    if not found:
        raise ValueError(
            f"ByteDataset: {root}: got no file that matches {', '.join(patterns)}, "
            "expected at least one; give patterns=('*.ext',) for other names"
        )
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read(files: list[Path], max_bytes: int | None) -> bytearray:
    data = bytearray()
    for path in files:
        if max_bytes is not None and len(data) >= max_bytes:
            break
        try:
            with path.open("rb") as file:
                data += file.read(-1 if max_bytes is None else max_bytes - len(data))
        except OSError as error:
            _unreadable(error)
    return data


def _unreadable(error: OSError) -> NoReturn:
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
    raise kind(
        f"ByteDataset: {error.filename}: cannot be read ({error.strerror}), expected a "
        "readable file; check the path and its permissions"
    ) from error
