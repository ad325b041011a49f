# SPDX-License-Identifier: Apache-2.0
"""metrics.csv: one row per step, also across interruptions."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from zfunc.cli.rundir import write_atomically


class Row(NamedTuple):
    """What a step measured.

    Attributes:
      step: 1 for the first.
      loss: Mean over the global batch, nats per byte.
      grad_norm: Before it was clipped.
      lr: The learning rate of this step's update.
      tokens: Bytes trained on so far.
      tokens_per_s: Of this step, over all ranks.
      elapsed_s: Time of training so far, interruptions left out.
      peak_rss_mb: Largest memory of a process so far, over the ranks, in 10^6 bytes.
      skipped: 1 if the update was left out because its gradients overflowed, else 0.
    """

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_s: float
    elapsed_s: float
    peak_rss_mb: float
    skipped: int


def read_rows(path: Path, last_step: int | None = None) -> list[Row]:
    """The rows of a metrics file, up to a step; a line that was cut off is left out.

    Args:
      path: The file; none is no rows.
      last_step: The last step to read; all if None.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in map(_parsed, csv.reader(file)) if row is not None]
    return [row for row in rows if last_step is None or row.step <= last_step]


def _parsed(fields: list[str]) -> Row | None:
    try:
        step, loss, grad_norm, lr, tokens, *rest = fields
        *rest, skipped = rest if len(rest) > 3 else (*rest, "0")  # an older file
        rate, elapsed_s, peak_rss_mb = map(float, rest)
        measured = (rate, elapsed_s, peak_rss_mb, int(skipped))
        return Row(
            int(step), float(loss), float(grad_norm), float(lr), int(tokens), *measured
        )
    except ValueError:  # the header, or a line that was cut off
        return None


def format_rows(rows: Iterable[Row], *, header: bool) -> str:
    """Rows as CSV; numbers read back as the same bits.

    Examples:
      >>> print(
      ...     format_rows([Row(1, 0.1, 2.0, 0.0, 64, 9.5, 1.0, 300.0, 0)], header=False)
      ... )
      1,0.1,2.0,0.0,64,9.5,1.0,300.0,0
      <BLANKLINE>
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if header:
        writer.writerow(Row._fields)
    writer.writerows(rows)
    return text.getvalue()


class MetricsFile:
    """A metrics file that is written to; rows are on the disk's side at once.

    Args:
      path: The file. Rows after ``last_step`` are dropped.
      last_step: The step that the run goes on from; 0 begins the file.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        rows = read_rows(path, last_step)
        write_atomically(path, format_rows(rows, header=True))
        self.elapsed_s = rows[-1].elapsed_s if rows else 0.0
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Add a step."""
        self._file.write(format_rows([row], header=False))
        self._file.flush()

    def sync(self) -> None:
        """Wait until all rows would survive a loss of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; its rows are complete without this."""
        self._file.close()
