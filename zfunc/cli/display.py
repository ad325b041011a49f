# SPDX-License-Identifier: Apache-2.0
"""Progress on rank 0: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from zfunc.cli.metrics import Row

PLAIN_LINES = 20
PLAIN_WIDTH = 100


class Display(AbstractContextManager["Display"], Protocol):
    """Shows the steps of a training while it runs."""

    def step(self, row: Row) -> None:
        """Show a step."""
        ...


def make_console() -> Console:
    """The console of rank 0; not wrapped at 80 columns where there is no terminal."""
    console = Console(emoji=False, highlight=False)
    if console.is_terminal:
        return console
    return Console(emoji=False, highlight=False, width=PLAIN_WIDTH)


def make_display(console: Console, steps: int, done: int, state_mb: float) -> Display:
    """The display that suits the console.

    Args:
      console: Where to write.
      steps: Of the whole run.
      done: Steps that are done already.
      state_mb: Size of the training state per rank.
    """
    if console.is_terminal:
        return _Live(console, steps, done, state_mb)
    return _Plain(console, steps, state_mb)


class _Plain:
    """A line at the first step, at the last one, and at about 20 between."""

    def __init__(self, console: Console, steps: int, state_mb: float) -> None:
        self._console, self._steps, self._state_mb = console, steps, state_mb
        self._every = max(1, steps // PLAIN_LINES)

    def step(self, row: Row) -> None:
        if row.step % self._every and row.step not in (1, self._steps):
            return
        self._console.print(
            f"step {row.step:>{len(str(self._steps))}}/{self._steps}  "
            f"loss {row.loss:.4f}  {row.tokens_per_s:,.0f} tokens/s  "
            f"state {self._state_mb:.1f} MB/rank  peak {row.peak_rss_mb:,.0f} MB/rank  "
            f"{row.elapsed_s:.1f} s"
        )

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        return None


class _Live:
    """One line that changes, with the time that is left; sizes are per rank."""

    def __init__(
        self, console: Console, steps: int, done: int, state_mb: float
    ) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._state_mb = state_mb
        self._task = self._progress.add_task(
            "train", total=steps, completed=done, figures="starting"
        )

    def step(self, row: Row) -> None:
        figures = (
            f"loss [bold]{row.loss:.4f}[/]  {row.tokens_per_s:,.0f} tokens/s  "
            f"state {self._state_mb:.1f} MB  RSS {row.peak_rss_mb:,.0f} MB"
        )
        self._progress.update(self._task, completed=row.step, figures=figures)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._progress.stop()
