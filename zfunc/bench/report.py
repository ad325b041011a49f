# SPDX-License-Identifier: Apache-2.0
"""A result as a table on the terminal, as JSON and as CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from zfunc.bench.presets import INSTALL
from zfunc.bench.result import LOSS_TOLERANCE, Measured, Result

# A loss, and the column of the steps beside them.
_LOSS_WIDTH, _STEP_WIDTH = len("6.253788"), 6
_UNCOUNTED = (
    "n/a: inductor's code makes its buffers where a count of operations on the CPU "
    "does not see them"
)


def print_result(console: Console, result: Result) -> None:
    """Print what was measured.

    Args:
      console: Where to.
      result: What was found.
    """
    for line in _headlines(result):
        console.print(line, markup=False)
    console.print("\nstep time", _times(result), sep="\n")
    if result.ratios:
        title = "\nratios of the medians: less than 1 is faster than the peer"
        console.print(title, _ratios(result), sep="\n")
    console.print("\nloss of each step, mean over the ranks")
    for some in _fitting(result.measured, console.width):
        console.print(_losses(some))
    for line in _footnotes(result):
        console.print(line, markup=False)  # [bench] is no style


def _headlines(result: Result) -> Iterator[str]:
    about = result.about
    model, ranks, threads = about["model"], about["ranks"], about["threads"]
    yield (
        f"{model['name']}: {about['num_params']:,} parameters in {model['layers']} "
        f"layers of {model['hidden']}, batch {model['batch']} x {model['seq_len']} "
        "per rank, float32, AdamW"
    )
    yield (
        f"{ranks} rank{'s' * (ranks > 1)} x {threads} thread{'s' * (threads > 1)} on "
        f"{about['device']}, {about['rounds']} interleaved rounds of {about['steps']} "
        "steps"
    )


def _times(result: Result) -> Table:
    table = _table()
    table.add_column("contender")
    for heading in ("median ms", "rounds ms", "live peak MB"):
        table.add_column(heading, justify="right")
    for contender in result.measured:
        peak_bytes = contender.live_peak_bytes
        table.add_row(
            contender.name,
            _ms(contender.median_s),
            f"{_ms(min(contender.medians_s))} to {_ms(max(contender.medians_s))}",
            "n/a" if peak_bytes is None else f"{peak_bytes / 1e6:.1f}",
        )
    return table


def _ratios(result: Result) -> Table:
    table = _table()
    table.add_column("contender / peer")
    table.add_column("ratio", justify="right")
    table.add_column("rounds", justify="right")
    for row in result.ratios:
        table.add_row(
            f"{row.name} / {row.peer}",
            f"{row.ratio:.2f}",
            f"{row.low:.2f} to {row.high:.2f}",
        )
    return table


def _fitting(measured: Sequence[Measured], width: int) -> Iterator[list[Measured]]:
    """Groups of contenders whose losses are beside each other in so many characters."""
    group: list[Measured] = []
    used = _STEP_WIDTH
    for contender in measured:
        wide = max(_LOSS_WIDTH, *map(len, contender.name.split("-"))) + 2
        if group and used + wide > width:
            yield group
            group, used = [], _STEP_WIDTH
        group.append(contender)
        used += wide
    yield group


def _losses(measured: Sequence[Measured]) -> Table:
    table = _table()
    table.add_column("step", justify="right")
    for contender in measured:
        table.add_column(contender.name.replace("-", "\n"), justify="right")
    losses = zip(*(contender.losses for contender in measured), strict=True)
    for number, row in enumerate(losses, 1):
        table.add_row(str(number), *(f"{loss:.6f}" for loss in row))
    return table


def _footnotes(result: Result) -> Iterator[str]:
    apart = result.loss_difference
    verdict = "the same training" if apart.is_small else "NOT the same training"
    yield (
        f"largest difference of losses: {apart.largest:.1e}, at step {apart.step} "
        f"between {apart.low} and {apart.high} (at most {LOSS_TOLERANCE:.0e} allowed): "
        f"{verdict}"
    )
    yield (
        f"peak RSS: {result.peak_rss_bytes / 1e6:,.0f} MB, of the largest rank with "
        "all contenders in it"
    )
    if any(contender.live_peak_bytes is None for contender in result.measured):
        yield _UNCOUNTED
    if result.left_out:
        yield f"left out, not installed: {', '.join(result.left_out)}: {INSTALL}"


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def as_json(result: Result) -> dict[str, Any]:
    """The result as JSON takes it: all that was measured, in seconds and bytes.

    Args:
      result: What was found.
    """
    return {
        **result.about,
        "contenders": [
            {
                **contender._asdict(),
                "median_s": contender.median_s,
                "medians_s": contender.medians_s,
            }
            for contender in result.measured
        ],
        "ratios": [row._asdict() for row in result.ratios],
        "loss_difference": {
            **result.loss_difference._asdict(),
            "tolerance": LOSS_TOLERANCE,
        },
        "peak_rss_bytes": result.peak_rss_bytes,
        "left_out": result.left_out,
    }


def write_json(path: Path, result: Result) -> None:
    """Write ``as_json``.

    Args:
      path: The file.
      result: What was found.
    """
    path.write_text(json.dumps(as_json(result), indent=2) + "\n", encoding="utf-8")


def write_csv(path: Path, result: Result) -> None:
    """Write one row for each timed step and one for each loss.

    Columns: contender, what (``step_s`` or ``loss``), round (empty for losses), step
    (both counted from 1) and value.

    Args:
      path: The file.
      result: What was found.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("contender", "what", "round", "step", "value"))
        for contender in result.measured:
            writer.writerows(_rows(contender))


def _rows(contender: Measured) -> Iterator[tuple[str, str, str, int, float]]:
    for step, loss in enumerate(contender.losses, 1):
        yield contender.name, "loss", "", step, loss
    for number, steps_s in enumerate(contender.rounds_s, 1):
        for step, step_s in enumerate(steps_s, 1):
            yield contender.name, "step_s", str(number), step, step_s
