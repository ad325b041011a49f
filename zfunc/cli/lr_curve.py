# SPDX-License-Identifier: Apache-2.0
"""The loss against the learning rate: smoothed, read, and drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SCHEMA: Final = 1
# What is taken of the last rate before the divergence: the usual margin.
MARGIN = 10.0
# Steps whose losses make a slope: a quarter of a decade and two steps on each side.
_NEAR = 10**0.25
_NEIGHBOURS = 2


class Point(NamedTuple):
    """One step of a sweep.

    Attributes:
      step: 1 for the first.
      lr: The rate of this step's update.
      loss: Before that update; the effect of the rate is seen in the next one.
      smoothed: The running mean of the losses so far.
    """

    step: int
    lr: float
    loss: float
    smoothed: float


class Curve(NamedTuple):
    """What a sweep measured.

    Attributes:
      points: Of the steps before the divergence, all finite.
      diverged: The step and the rate at which it was seen; None if it was not.
    """

    points: tuple[Point, ...]
    diverged: tuple[int, float] | None


class Suggestion(NamedTuple):
    """What to read off a curve.

    Attributes:
      steepest_lr: Where the loss falls most per factor of the rate, before the lowest
        smoothed loss; None if it never falls.
      lowest_lr: Where the smoothed loss is lowest.
      last_lr: The last rate before the divergence; None if there was none.
      lr: The suggestion: the steepest rate, but at most a tenth of the last one; None
        if the loss never falls.
    """

    steepest_lr: float | None
    lowest_lr: float
    last_lr: float | None
    lr: float | None


def smoothed(losses: Sequence[float], smoothing: float) -> float:
    r"""The running mean :math:`\frac{1 - \beta}{1 - \beta^n} \sum_i \beta^{n-i} l_i`.

    Args:
      losses: :math:`l_1, \dots, l_n`, at least one.
      smoothing: :math:`\beta` in [0, 1); 0 is the last loss.

    Examples:
      >>> smoothed([4.0, 1.0], 0.5)
      2.0
    """
    mean = 0.0
    for loss in losses:
        mean = smoothing * mean + (1 - smoothing) * loss
    return mean / (1 - smoothing ** len(losses))


def has_diverged(points: Sequence[Point], loss: float, mean: float, by: float) -> bool:
    """Whether a next loss ends the sweep.

    Args:
      points: The steps before it.
      loss: Of the step.
      mean: The running mean with it.
      by: How many times the lowest running mean so far is too much.

    Examples:
      >>> has_diverged([Point(1, 0.1, 2.0, 2.0)], 9.0, 4.1, by=2.0)
      True
      >>> has_diverged([], float("nan"), float("nan"), by=2.0)
      True
    """
    if not math.isfinite(loss):
        return True
    return bool(points) and mean > by * min(point.smoothed for point in points)


def suggestion(curve: Curve) -> Suggestion:
    """Read a curve.

    The slope at a step is that of the least-squares line through the losses (not the
    smoothed ones, which are late) around it, against the logarithm of the rate.

    Args:
      curve: At least one point.

    Examples:
      >>> losses = (4.0, 4.0, 3.9, 3.2, 2.5, 2.4, 2.4, 2.6, 3.4)
      >>> points = [Point(i, 0.01 * 2**i, x, x) for i, x in enumerate(losses)]
      >>> suggestion(Curve(tuple(points), diverged=(9, 5.12)))
      Suggestion(steepest_lr=0.08, lowest_lr=0.32, last_lr=2.56, lr=0.08)
    """
    points = curve.points
    lowest = min(range(len(points)), key=lambda i: points[i].smoothed)
    slopes = [_slope(_around(points, i)) for i in range(lowest + 1)]
    steepest = None
    if min(slopes) < 0:
        steepest = points[slopes.index(min(slopes))].lr
    last = points[-1].lr if curve.diverged else None
    best = steepest
    if best is not None and last is not None:
        best = min(best, last / MARGIN)
    return Suggestion(steepest, points[lowest].lr, last, best)


def _around(points: Sequence[Point], center: int) -> Sequence[Point]:
    """The steps at similar rates: within a factor, and two on each side at least."""
    lr = points[center].lr
    first = last = center
    while first > 0 and (
        center - first < _NEIGHBOURS or points[first - 1].lr * _NEAR >= lr
    ):
        first -= 1
    while last < len(points) - 1 and (
        last - center < _NEIGHBOURS or points[last + 1].lr <= lr * _NEAR
    ):
        last += 1
    return points[first : last + 1]


def _slope(points: Sequence[Point]) -> float:
    """Of the line through the losses against the logarithm of the rates."""
    x = [math.log(point.lr) for point in points]
    x_mean = sum(x) / len(x)
    y_mean = sum(point.loss for point in points) / len(points)
    spread = sum((u - x_mean) ** 2 for u in x)
    shared = sum(
        (u - x_mean) * (point.loss - y_mean) for u, point in zip(x, points, strict=True)
    )
    return shared / spread if spread else 0.0


def as_json(curve: Curve, read: Suggestion, about: dict[str, Any]) -> str:
    """A curve and what was read off it, as JSON; numbers read back as the same bits.

    Args:
      curve: What was measured.
      read: Its suggestion.
      about: What it is of.

    Examples:
      >>> curve = Curve((Point(1, 0.1, 2.0, 2.0),), None)
      >>> json.loads(as_json(curve, suggestion(curve), {}))["points"][0]["lr"]
      0.1
    """
    diverged = curve.diverged
    document = {
        "schema": SCHEMA,
        **about,
        "diverged": diverged and {"step": diverged[0], "lr": diverged[1]},
        "suggestion": read._asdict(),
        "points": [point._asdict() for point in curve.points],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def draw(path: Path, curve: Curve, read: Suggestion) -> None:
    """Draw the losses and the smoothed loss against the rate, logarithmically.

    Args:
      path: The PNG to write.
      curve: What was measured.
      read: Its suggestion.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = [point.lr for point in curve.points]
    losses = [point.loss for point in curve.points]
    axes.plot(rates, losses, ".", markersize=3, color="silver", label="loss")
    axes.plot(rates, [point.smoothed for point in curve.points], label="smoothed")
    if curve.diverged is not None:
        label = f"diverged at {curve.diverged[1]:.3g}"
        axes.axvline(curve.diverged[1], color="tab:red", linestyle=":", label=label)
    if read.lr is not None:
        label = f"suggested: {read.lr:.2g}"
        axes.axvline(read.lr, color="tab:green", linestyle="--", label=label)
    axes.set(xlabel="learning rate", ylabel="nats per byte", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
