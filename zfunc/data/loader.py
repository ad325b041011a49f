# SPDX-License-Identifier: Apache-2.0
"""A sharded, resumable loader: ``batch, cursor = loader.next(cursor)`` is pure."""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .datasets import TokenDataset
from .permutation import permute

Batch = dict[str, Tensor]


class Cursor(NamedTuple):
    """Where training is in the data: the whole state of a loader.

    A pytree of three Python integers, the same on every rank; ``Cursor(*json_list)``
    restores one. It counts samples of the *global* stream, so it stays valid when
    the number of ranks or the global batch changes.

    Attributes:
      epoch: How many times every window has been visited.
      position: Samples of this epoch already visited, below the number of windows.
      seed: Selects the order of the windows.

    Examples:
      >>> import json
      >>> cursor = Cursor(epoch=2, position=96, seed=0)
      >>> Cursor(*json.loads(json.dumps(cursor))) == cursor
      True
    """

    epoch: int = 0
    position: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Loader:
    r"""Batches of a dataset for one rank, as a pure function of a cursor.

    The dataset is cut into ``num_windows = len(dataset) // (seq_len + 1)``
    non-overlapping windows; the tokens that remain at the end are never read. Sample
    s of the infinite global stream is window
    :math:`\pi_{seed, \lfloor s/n \rfloor}(s \bmod n)` for n windows, where
    :math:`\pi_{seed, epoch}` is ``permute``: each epoch visits every window exactly
    once. The global batch is ``global_batch`` consecutive samples, whatever the
    epoch: at the end of an epoch a batch that is not full is filled from the next
    epoch, so nothing is dropped or repeated and all batches have one shape. Rank r
    of w reads samples ``[r, r + 1) * global_batch / w`` of it.

    Args:
      dataset: Where the tokens are.
      seq_len: T; a sample is T + 1 tokens, T inputs and their T targets.
      global_batch: Samples per step over all ranks.
      rank: This rank's index along the data axis.
      world: Number of ranks along the data axis, dividing ``global_batch``.

    Raises:
      ValueError: A number is out of range, ``world`` does not divide
        ``global_batch``, or the dataset has fewer windows than one global batch.

    Laws:
      The global batch (rank order concatenation) does not depend on ``world``;
      ``next`` from a stored cursor continues as if never interrupted.

    Examples:
      >>> from zfunc.data import ByteDataset, standard_library_files
      >>> dataset = ByteDataset(standard_library_files()[:2], max_bytes=1000)
      >>> loader = Loader(dataset, seq_len=9, global_batch=4)
      >>> batch, cursor = loader.next(Cursor(seed=1))
      >>> batch["tokens"].shape, cursor
      (torch.Size([4, 10]), Cursor(epoch=0, position=4, seed=1))

    Differs from:
      ``torch.utils.data.DataLoader`` keeps its place in an iterator: a resume skips
      through the epoch, and with another number of ranks gets other batches.
    """

    dataset: TokenDataset
    _: KW_ONLY
    seq_len: int
    global_batch: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        """Check that every rank can be given its share of a global batch."""
        for name in ("seq_len", "global_batch", "world"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"Loader: {name}={getattr(self, name)}, expected at least 1"
                )
        if not 0 <= self.rank < self.world:
            raise ValueError(
                f"Loader: rank={self.rank}, expected 0 <= rank < world={self.world}"
            )
        if self.global_batch % self.world:
            fitting = -(-self.global_batch // self.world) * self.world
            raise ValueError(
                f"Loader: global_batch={self.global_batch} is not a multiple of "
                f"world={self.world}; type global_batch={fitting}"
            )
        if self.num_windows < self.global_batch:
            needed = self.global_batch * (self.seq_len + 1)
            raise ValueError(
                f"Loader: {self.dataset}: got {len(self.dataset)} tokens, expected at "
                f"least {needed} for one global batch of {self.global_batch} windows "
                f"of {self.seq_len + 1} tokens; give more text, or a smaller "
                "global_batch or seq_len"
            )

    @property
    def num_windows(self) -> int:
        """Samples per epoch."""
        return len(self.dataset) // (self.seq_len + 1)

    @property
    def local_batch(self) -> int:
        """Samples per step on this rank."""
        return self.global_batch // self.world

    def next(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """This rank's part of the global batch at a cursor, and the cursor after it.

        Args:
          cursor: ``Cursor(seed=...)`` to start, a returned or restored one to go on.

        Returns:
          ``({"tokens": int64 [local_batch, seq_len + 1]}, cursor)``.

        Raises:
          ValueError: The cursor is of a dataset with more windows.
        """
        n = self.num_windows
        if cursor.epoch < 0 or not 0 <= cursor.position < n:
            raise ValueError(
                f"Loader: got {cursor}, expected epoch >= 0 and 0 <= position < {n}, "
                "the number of windows; use the dataset and seq_len that the cursor "
                "was made with, or start again with Cursor(seed=...)"
            )
        first = cursor.position + self.rank * self.local_batch
        samples = range(first, first + self.local_batch)
        tokens = torch.stack([self._sample(s, cursor) for s in samples])
        epochs, position = divmod(cursor.position + self.global_batch, n)
        return {"tokens": tokens}, Cursor(cursor.epoch + epochs, position, cursor.seed)

    def batches(self, cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        """``next`` for ever: pairs of a batch and the cursor after it.

        Args:
          cursor: Where to start.

        Yields:
          What ``next`` returns; store the cursor with the state that has seen the
          batch.
        """
        while True:
            batch, cursor = self.next(cursor)
            yield batch, cursor

    def _sample(self, sample: int, cursor: Cursor) -> Tensor:
        epochs, index = divmod(sample, self.num_windows)
        length = self.seq_len + 1
        window = permute(index, self.num_windows, cursor.seed, cursor.epoch + epochs)
        return self.dataset.window(window * length, length)
