# SPDX-License-Identifier: Apache-2.0
"""What kernels were measured at: a table, a CSV and a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from zfunc.bench.kernel_case import OURS
from zfunc.bench.kernels import Found, Measured

_COLORS = ("tab:blue", "silver", "tab:orange", "tab:green", "tab:red", "tab:purple")
_HEADINGS = (
    ("ms", 9),
    ("GB/s", 7),
    ("of roof", 7),
    ("over zfunc", 20),
    ("host us", 7),
    ("launches", 8),
    ("workspace MB", 12),
)
COLUMNS = (
    "case",
    "way",
    "bytes",
    "median_ms",
    "low_ms",
    "high_ms",
    "gb_per_s",
    "roof_gb_per_s",
    "roof_fraction",
    "ratio",
    "ratio_low",
    "ratio_high",
    "host_us",
    "launches",
    "workspace_mb",
    "bars",
)


def print_found(console: Console, found: Sequence[Found]) -> None:
    """Print a table of all ways, and the bars that cases have.

    Args:
      console: Where to.
      found: What was measured.
    """
    if not found:
        return
    console.print(f"roof: {found[0].roof / 1e9:.1f} GB/s", markup=False)
    for each in found:
        console.print(f"\n{each.case.name}", _table(each), sep="\n", soft_wrap=True)
    for line in bar_lines(found):
        console.print(line, markup=False, soft_wrap=True)


def _table(found: Found) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("way", min_width=8)
    for heading, width in _HEADINGS:
        table.add_column(heading, justify="right", min_width=width)
    for way in found.measured:
        table.add_row(way.name, *_cells(found, way))
    return table


def _cells(found: Found, way: Measured) -> Iterator[str]:
    ratio, low, high = found.ratio(way)
    yield f"{1e3 * way.median_s:.3f}"
    yield f"{found.case.bytes / way.median_s / 1e9:.1f}"
    yield f"{found.fraction(way):.2f}"
    yield "" if way.name == OURS else f"{ratio:.2f} ({low:.2f} to {high:.2f})"
    yield _or_empty(way.host_s, 1e6, ".0f")
    yield _or_empty(way.launches, 1, ".0f")
    yield _or_empty(way.workspace_bytes, 1e-6, ".1f")


def _or_empty(value: float | None, factor: float, how: str) -> str:
    return "" if value is None else f"{factor * value:{how}}"


def bar_lines(found: Sequence[Found]) -> list[str]:
    """A line for each bar: what was asked for, what was reached, pass or FAIL.

    Args:
      found: What was measured.
    """
    return [
        f"{each.case.name}: {verdict.said}"
        for each in found
        for verdict in each.verdicts
    ]


def write_found(path: Path, found: Sequence[Found]) -> None:
    """Write a row for each way of each case, with ``COLUMNS``.

    Args:
      path: The file.
      found: What was measured.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for each in found:
            writer.writerows(_row(each, way) for way in each.measured)


def _row(found: Found, way: Measured) -> list[object]:
    bars = "; ".join(v.said for v in found.verdicts) if way.name == OURS else ""
    return [
        found.case.name,
        way.name,
        found.case.bytes,
        *(1e3 * s for s in (way.median_s, min(way.rounds_s), max(way.rounds_s))),
        found.case.bytes / way.median_s / 1e9,
        found.roof / 1e9,
        found.fraction(way),
        *found.ratio(way),
        "" if way.host_s is None else 1e6 * way.host_s,
        "" if way.launches is None else way.launches,
        "" if way.workspace_bytes is None else way.workspace_bytes / 1e6,
        bars,
    ]


def plot_found(path: Path, found: Sequence[Found]) -> None:
    """Draw the fraction of the roof of each way, a group of bars for each case.

    Args:
      path: The PNG to write.
      found: What was measured; at least one case.
    """
    bars = sum(len(each.measured) + 1 for each in found)
    figure = Figure(figsize=(9, 1.5 + 0.17 * bars), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(w.name for each in found for w in each.measured))
    ticks, place = [], 0.0
    for each in found:
        begin = place
        for way in each.measured:
            color = _COLORS[names.index(way.name) % len(_COLORS)]
            axes.barh(place, each.fraction(way), height=0.9, color=color)
            place += 1
        ticks.append((begin + place - 1) / 2)
        place += 1
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(ticks, [each.case.name for each in found], fontsize=7)
    axes.invert_yaxis()
    for name in names:  # for the legend alone
        axes.barh([0], [0], color=_COLORS[names.index(name) % len(_COLORS)], label=name)
    axes.legend(fontsize=7)
    axes.set(xlabel=f"fraction of the roof, {found[0].roof / 1e9:.0f} GB/s")
    figure.savefig(path, dpi=120, format="png")
