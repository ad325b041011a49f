# SPDX-License-Identifier: Apache-2.0
"""The text to learn: opened, split, and recognised when a run goes on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from zfunc.cli.config import TrainConfig
from zfunc.cli.errors import Problem, UsageError
from zfunc.data import (
    ByteDataset,
    TokenRange,
    standard_library_files,
    train_validation_split,
)

VALIDATION_FRACTION = 0.05
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Corpus:
    """Bytes in two parts: the front to train on, the back to evaluate on."""

    name: str
    whole: ByteDataset
    train: TokenRange
    validation: TokenRange

    def sha256(self) -> str:
        """Of all the bytes."""
        digest = hashlib.sha256()
        for start in range(0, len(self.whole), _CHUNK_BYTES):
            length = min(_CHUNK_BYTES, len(self.whole) - start)
            tokens = self.whole.window(start, length).to(torch.uint8)
            digest.update(tokens.numpy().tobytes())
        return digest.hexdigest()


def open_corpus(data: Path | None) -> Corpus:
    """Read the text of ``--data``.

    Args:
      data: A file or a folder; None is Python's standard library.

    Raises:
      UsageError: It cannot be read, or is too short to be split.
    """
    try:
        if data is None:
            name = "the standard library's sources"
            whole = ByteDataset(standard_library_files())
        else:
            name, whole = str(data), ByteDataset(data)
        train, validation = train_validation_split(whole, VALIDATION_FRACTION)
    except (OSError, ValueError) as error:
        # Up to the advice, which is for callers of the library.
        text = str(error).partition("; ")[0].rpartition(": ")[2]
        raise UsageError([Problem(f"--data {data or ''}".strip(), text)]) from error
    return Corpus(name, whole, train, validation)


def corpus_problems(data: Path | None, config: TrainConfig | None) -> Iterator[Problem]:
    """Whether the text of a run can be read, and is enough for one step.

    Args:
      data: The text, as for ``open_corpus``.
      config: Of the run; None to see only if the text can be read.
    """
    try:
        corpus = open_corpus(data)
    except UsageError as error:
        yield from error.problems
        return
    if config is None:
        return
    window = config.seq_len + 1
    windows = len(corpus.train) // window
    if windows < config.batch_size or len(corpus.validation) < window:
        for_training = config.batch_size * window / (1 - VALIDATION_FRACTION)
        needed = math.ceil(max(for_training, window / VALIDATION_FRACTION)) + window
        yield Problem(
            f"--data {data or ''}".strip(),
            f"{len(corpus.whole)} bytes are too little for --batch-size "
            f"{config.batch_size} and --seq-len {config.seq_len}, which need about "
            f"{needed}: give more text, or smaller ones",
        )
