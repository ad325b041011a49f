# SPDX-License-Identifier: Apache-2.0
"""A plan as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from zfunc.plan.paper import PaperRow
from zfunc.plan.planner import Stage
from zfunc.plan.request import Request
from zfunc.plan.suggest import Suggestion, command, transformations
from zfunc.plan.totals import live_bytes

SCHEMA: Final = 1
_PLOT_POINTS: Final = 2000

Row = tuple[str, list[str]]


def print_plan(
    console: Console,
    request: Request,
    stages: Sequence[Stage],
    memory_bytes: int | None = None,
) -> None:
    """The table, one column for each stage; GB are 1e9 bytes."""
    count = stages[0].num_params
    size = f"{count / 1e9:.3f} billion" if count >= 1e8 else f"{count:,}"
    console.print(
        f"{request.model}: {size} parameters (Ψ) on {request.ranks} "
        f"ranks, {request.precision}, {request.samples_per_rank} x {request.seq_len} "
        f"tokens per rank in {request.microbatches} "
        f"microbatch{'es' * (request.microbatches > 1)}"
        f"{', recomputed' if request.remat else ''}"
    )
    table = Table("each rank", *[f"ZeRO {s.zero}" for s in stages], box=None)
    for name, cells in _rows(stages, memory_bytes):
        table.add_row(name, *cells)
    console.print(table)


def _rows(stages: Sequence[Stage], memory_bytes: int | None) -> Iterator[Row]:
    yield "model states", [_gb(s.states.total) for s in stages]
    for part in stages[0].states._fields:
        yield f"  {part}", [_gb(getattr(s.states, part)) for s in stages]
    yield "peak memory", [_gb(s.peak_bytes) for s in stages]
    for kind in stages[0].peak.bytes._fields:
        sizes = [getattr(s.peak.bytes, kind) for s in stages]
        if any(sizes):
            yield f"  {kind}", [_gb(size) for size in sizes]
    if memory_bytes is not None:
        fits = [s.peak_bytes <= memory_bytes for s in stages]
        yield f"fits in {_gb(memory_bytes)}", ["yes" if f else "no" for f in fits]
    yield "sent on the wire", [_gb(s.sent_bytes) for s in stages]
    yield (
        "  parameters",
        [f"{s.wire_elements / s.num_params:.2f} Ψ" for s in stages],
    )
    yield "operations", [f"{s.flops / 1e12:.4g} TFLOP" for s in stages]
    yield "moved in memory", [_gb(s.moved_bytes) for s in stages]
    yield "step, estimated", [_time(s.seconds.step) for s in stages]
    yield "  computation", [_time(s.seconds.compute) for s in stages]
    yield "  messages", [_time(s.seconds.comm) for s in stages]


def _gb(size_bytes: float) -> str:
    """Decimal gigabytes: four digits, at most three of them after the point."""
    gigabytes = size_bytes / 1e9
    if 0 < gigabytes < 0.0005:
        return f"{gigabytes:.1e} GB"
    digits = max(0, 3 - len(str(int(gigabytes)).lstrip("0")))
    return f"{gigabytes:,.{digits}f} GB"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def print_paper(console: Console, rows: Sequence[PaperRow]) -> None:
    """The table of the ZeRO paper, and what traced programs have in its place."""
    head = ("", "ZeRO paper", "traced", "difference", "of it: parameters", "moments")
    table = Table(*head, "weights", "gradients", "on the wire", box=None)
    for row in rows:
        states, paper = row.stage.states, float(row.paper_bytes)
        reduced = f"{row.reduce} reductions{', after the backward' * row.late}"
        table.add_row(
            f"{row.stage.zero} {row.name}, {reduced}",
            _gb(paper),
            _gb(states.total),
            f"{100 * (states.total / paper - 1):+.2f}%",
            *[_gb(part) for part in states],
            f"{row.stage.wire_elements / row.stage.num_params:.2f} Ψ",
        )
    console.print(table)


def print_suggestion(
    console: Console, suggestion: Suggestion, memory_bytes: int
) -> None:
    """What to type for a model that fits."""
    request, stage, fits = suggestion
    peak, limit = _gb(stage.peak_bytes), _gb(memory_bytes)
    text = (
        f"fits in {limit}, with {peak} at the peak"
        if fits
        else f"nothing tried fits in {limit}; the least is {peak}"
    )
    lines = [
        f"{text}:",
        f"  {command(request, stage.zero)}",
        f"  {transformations(request, stage.zero)}",
    ]
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def as_json(
    request: Request,
    stages: Sequence[Stage],
    suggestion: Suggestion | None = None,
    paper: Sequence[PaperRow] = (),
    wall_s: float | None = None,
) -> str:
    """All numbers, without the timelines; the keys are described in docs/plan.md."""
    rates = request.rates
    document = {
        "schema": SCHEMA,
        "request": dataclasses.asdict(request),
        "rates": dataclasses.asdict(rates),
        "stages": [_stage_json(stage) for stage in stages],
        "suggestion": suggestion and _suggestion_json(suggestion),
        "paper": [_paper_json(row) for row in paper],
        "wall_s": wall_s,
    }
    return json.dumps(document, indent=2)


def _stage_json(stage: Stage) -> dict[str, Any]:
    return {
        "zero": stage.zero,
        "num_params": stage.num_params,
        "model_states": {**stage.states._asdict(), "total": stage.states.total},
        "peak_bytes": stage.peak_bytes,
        "peak_by_kind": stage.peak.bytes._asdict(),
        "peak_at": stage.peak_at,
        "comm": [dataclasses.asdict(row) for row in stage.comm],
        "sent_bytes": stage.sent_bytes,
        "wire_elements": stage.wire_elements,
        "flops": stage.flops,
        "moved_bytes": stage.moved_bytes,
        "seconds": stage.seconds._asdict(),
        "traced_layers": list(stage.traced),
    }


def _suggestion_json(suggestion: Suggestion) -> dict[str, Any]:
    request, stage, fits = suggestion
    return {
        "fits": fits,
        "request": dataclasses.asdict(request),
        "command": command(request, stage.zero),
        "transformations": transformations(request, stage.zero),
        "stage": _stage_json(stage),
    }


def _paper_json(row: PaperRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "reduce": row.reduce,
        "late": row.late,
        "paper_bytes": float(row.paper_bytes),
        "stage": _stage_json(row.stage),
    }


def plot(stages: Sequence[Stage], path: Path) -> None:
    """Live memory over the program, by kind, one panel for each stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4 * len(stages)), layout="constrained")
    panels = figure.subplots(len(stages), 1, squeeze=False)[:, 0]
    kinds = stages[0].peak.bytes._fields
    for stage, panel in zip(stages, panels, strict=True):
        timeline = list(live_bytes(stage.tokens))
        every = max(1, len(timeline) // _PLOT_POINTS)
        points = range(0, len(timeline), every)
        # Of each stretch the moment with most bytes, so that no peak is lost.
        tops = [max(timeline[p : p + every], key=sum) for p in points]
        columns = [[top[i] / 1e9 for top in tops] for i in range(len(kinds))]
        panel.stackplot(points, columns, labels=kinds)
        panel.set(ylabel="GB", title=f"ZeRO {stage.zero}", xlim=(0, len(timeline)))
    panels[-1].set_xlabel("operations of the step, in order")
    panels[0].legend(loc="upper left", fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)
