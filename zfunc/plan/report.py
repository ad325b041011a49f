# SPDX-License-Identifier: Apache-2.0
"""A plan as a table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from zfunc.plan.planner import Stage
from zfunc.plan.request import Request
from zfunc.plan.suggest import Suggestion, command

_PLOT_POINTS = 2000


def print_plan(console: Console, request: Request, stages: Sequence[Stage]) -> None:
    """The table, one column for each stage; GB are 1e9 bytes."""
    first = stages[0]
    console.print(
        f"{request.model}: {first.num_params / 1e9:.3f} billion parameters on "
        f"{request.ranks} ranks, {request.precision}, {request.samples_per_rank} x "
        f"{request.seq_len} tokens per rank in {request.microbatches} microbatches"
        f"{', recomputed' if request.remat else ''}"
    )
    table = Table("each rank", *[f"ZeRO {s.zero}" for s in stages], box=None)
    for name, cells in _rows(stages):
        table.add_row(name, *cells)
    console.print(table)


def _rows(stages: Sequence[Stage]) -> list[tuple[str, list[str]]]:
    def gb(sizes: list[int]) -> list[str]:
        return [f"{size / 1e9:.3g} GB" for size in sizes]

    rows = [
        ("model states", gb([s.model_states_bytes for s in stages])),
        ("peak memory", gb([s.peak_bytes for s in stages])),
    ]
    for kind in stages[0].peak._fields:
        sizes = [getattr(s.peak, kind) for s in stages]
        if any(sizes):
            rows.append((f"  {kind}", gb(sizes)))
    rows.append(("sent on the wire", gb([s.total_sent_bytes for s in stages])))
    rows += [
        ("operations", [f"{s.flops / 1e12:.4g} TFLOP" for s in stages]),
        ("moved in memory", gb([s.moved_bytes for s in stages])),
        ("step, overlapped", [_time(max(s.compute_s, s.comm_s)) for s in stages]),
        ("step, one by one", [_time(s.compute_s + s.comm_s) for s in stages]),
    ]
    return rows


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def print_suggestion(
    console: Console, suggestion: Suggestion, memory_bytes: int
) -> None:
    """What to type for a model that fits."""
    request, stage, fits = suggestion
    peak_gb, limit_gb = stage.peak_bytes / 1e9, memory_bytes / 1e9
    text = (
        f"fits in {limit_gb:g} GB with {peak_gb:.3g} GB at the peak"
        if fits
        else f"nothing tried fits in {limit_gb:g} GB; the least is {peak_gb:.3g} GB"
    )
    console.print(f"{text}:\n  {command(request, stage.zero)}", soft_wrap=True)


def as_json(
    request: Request, stages: Sequence[Stage], suggestion: Suggestion | None
) -> str:
    """All numbers, without the timelines: bytes, seconds, operations.

    ``{"request": {...}, "stages": [{"zero": ..., "peak": {"params": ...}, ...}],
    "suggestion": {"request", "zero", "peak_bytes", "fits", "command"} or null}``.
    """
    document = {
        "request": dataclasses.asdict(request),
        "stages": [_stage_json(stage) for stage in stages],
        "suggestion": suggestion and _suggestion_json(suggestion),
    }
    return json.dumps(document, indent=2)


def _stage_json(stage: Stage) -> dict[str, Any]:
    named = {
        f.name: getattr(stage, f.name)
        for f in dataclasses.fields(stage)
        if f.name != "timeline"
    }
    named["peak"] = stage.peak._asdict()
    totals = {
        "peak_bytes": stage.peak_bytes,
        "total_sent_bytes": stage.total_sent_bytes,
    }
    return {**named, **totals}


def _suggestion_json(suggestion: Suggestion) -> dict[str, Any]:
    request, stage, fits = suggestion
    return {
        "request": dataclasses.asdict(request),
        "zero": stage.zero,
        "peak_bytes": stage.peak_bytes,
        "fits": fits,
        "command": command(request, stage.zero),
    }


def plot(stages: Sequence[Stage], path: Path) -> None:
    """Live memory over the program, by kind, one panel for each stage."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4 * len(stages)), layout="constrained")
    panels = figure.subplots(len(stages), 1, squeeze=False)[:, 0]
    for stage, panel in zip(stages, panels, strict=True):
        every = max(1, len(stage.timeline) // _PLOT_POINTS)
        points = range(0, len(stage.timeline), every)
        columns = {
            kind: [
                max(m[i] for m in stage.timeline[p : p + every]) / 1e9 for p in points
            ]
            for i, kind in enumerate(stage.peak._fields)
        }
        used = {kind: column for kind, column in columns.items() if any(column)}
        panel.stackplot(points, list(used.values()), labels=list(used))
        panel.set(ylabel="GB", title=f"ZeRO {stage.zero}")
    panels[-1].set_xlabel("operations of the step, in order")
    panels[0].legend(loc="upper left", fontsize="small", ncols=4)
    figure.savefig(path, dpi=120)
