# SPDX-License-Identifier: Apache-2.0
"""loss.png: the loss of every step beside what counting bytes would reach."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zfunc.cli.metrics import Row


def plot_loss(path: Path, rows: Sequence[Row], unigram_entropy: float) -> None:
    """Draw the training loss and the entropy of the byte frequencies.

    Args:
      path: The PNG to write.
      rows: Of the metrics file.
      unigram_entropy: In nats per byte.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [row.step for row in rows], [row.loss for row in rows], label="train loss"
    )
    axes.axhline(
        unigram_entropy,
        linestyle="--",
        color="gray",
        label=f"byte-unigram entropy ({unigram_entropy:.2f})",
    )
    axes.set(xlabel="step", ylabel="nats per byte", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
