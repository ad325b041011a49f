# SPDX-License-Identifier: Apache-2.0
"""Who is told about a training's steps: rank 0 writes them down, the others nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

from zfunc.cli.display import Display
from zfunc.cli.hashes import Hashes, HashesFile
from zfunc.cli.metrics import MetricsFile, Row


class Observer(AbstractContextManager["Observer"], Protocol):
    """What a training tells while it runs."""

    elapsed_s: float

    def row(self, row: Row) -> None:
        """A step was measured."""
        ...

    def hashes(self, step: int, hashes: Hashes) -> None:
        """The state after a step was hashed; comes before the step's row."""
        ...

    def saving(self) -> None:
        """A checkpoint is about to be written; all rows up to it were given."""
        ...


class Silent:
    """The observer of the ranks that say nothing."""

    elapsed_s = 0.0

    def row(self, row: Row) -> None:
        """Nothing."""

    def hashes(self, step: int, hashes: Hashes) -> None:
        """Nothing."""

    def saving(self) -> None:
        """Nothing."""

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        return None


class Reporter:
    """Appends every step to the metrics file, hashes to theirs, and shows steps."""

    def __init__(
        self, metrics: MetricsFile, hashes: HashesFile, display: Display
    ) -> None:
        self._metrics, self._hashes, self._display = metrics, hashes, display
        self.elapsed_s = metrics.elapsed_s

    def row(self, row: Row) -> None:
        """Write it down and show it."""
        self._metrics.append(row)
        self._display.step(row)

    def hashes(self, step: int, hashes: Hashes) -> None:
        """Write them down."""
        self._hashes.append(step, hashes)

    def saving(self) -> None:
        """See that the rows are on the disk before the checkpoint is."""
        self._metrics.sync()
        self._hashes.sync()

    def __enter__(self) -> Observer:
        self._display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._display.__exit__(kind, error, where)
        self._metrics.close()
        self._hashes.close()
