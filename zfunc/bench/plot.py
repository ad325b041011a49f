# SPDX-License-Identifier: Apache-2.0
"""A result as a picture: the median step of each contender, and the rounds."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zfunc.bench.result import Result

_OURS, _THEIRS = "tab:blue", "silver"


def plot_result(path: Path, result: Result) -> None:
    """Draw a bar for each contender, from top to bottom in their order.

    Args:
      path: The PNG to write.
      result: What was found.
    """
    measured = result.measured
    figure = Figure(figsize=(7, 1.2 + 0.35 * len(measured)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    medians_ms = [1e3 * contender.median_s for contender in measured]
    colors = [_OURS if c.name.startswith("zfunc") else _THEIRS for c in measured]
    axes.barh([c.name for c in measured], medians_ms, color=colors)
    for place, contender in enumerate(measured):
        rounds_ms = [1e3 * median_s for median_s in contender.medians_s]
        axes.plot(rounds_ms, [place] * len(rounds_ms), ".", color="black", markersize=4)
        axes.annotate(
            f"{medians_ms[place]:.1f}",
            (max(rounds_ms), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
        )
    axes.invert_yaxis()
    axes.margins(x=0.12)
    about = result.about
    axes.set(
        xlabel="ms per step: median of the rounds (bar) and each round (dot)",
        title=f"{about['model']['name']}, {about['ranks']} x {about['threads']} "
        f"threads, {about['device']}",
    )
    figure.savefig(path, dpi=120, format="png")
