# SPDX-License-Identifier: Apache-2.0
"""``zfunc plan``: its options, and what it prints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from zfunc.cli.display import make_console
from zfunc.cli.ending import print_error
from zfunc.core.errors import TraceError
from zfunc.plan import (
    PlanError,
    Request,
    as_json,
    listed,
    paper_rows,
    plan,
    plot,
    print_paper,
    print_plan,
    print_suggestion,
    suggest,
)

_WHAT, _HOW, _OUT = "What is trained", "How", "What is written"
_STAGES = (0, 1, 2, 3)
_DEFAULT_RANKS = 64
_PAPER_WIDTH = 160


def _option(text: str, panel: str, **kwargs: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, **kwargs)


def plan_command(
    model: Annotated[
        str,
        _option("A preset (--list) or your.module:function.", _WHAT),
    ] = "7.5b",
    ranks: Annotated[int | None, _option("Ranks. [default: 64]", _HOW)] = None,
    mesh: Annotated[str | None, _option("The same as a mesh: data=1024.", _HOW)] = None,
    zero: Annotated[int | None, _option("One stage only.", _HOW, min=0, max=3)] = None,
    precision: Annotated[str, _option("bf16 or fp32.", _HOW)] = "bf16",
    reduce: Annotated[
        str, _option("What gradient reductions send: fp32 or bf16.", _HOW)
    ] = "fp32",
    seq_len: Annotated[int, _option("Tokens per sample.", _WHAT)] = 1024,
    batch_size: Annotated[
        int | None,
        _option("Samples per step, over all ranks. [default: one each]", _WHAT),
    ] = None,
    microbatches: Annotated[int, _option("Of each rank.", _HOW)] = 1,
    remat: Annotated[
        bool, _option("Recompute each block in the backward.", _HOW)
    ] = False,
    layers: Annotated[int | None, _option("Another depth.", _WHAT)] = None,
    device: Annotated[str, _option("h100, a100 or cpu, for times.", _HOW)] = "h100",
    wire_gb_per_s: Annotated[
        float | None,
        _option(
            "What a rank sends, for times. [default: NVLink, or of more than 8 ranks "
            "the network card]",
            _HOW,
        ),
    ] = None,
    memory_gb: Annotated[
        float | None,
        _option("Suggest the cheapest configuration that fits in this.", _HOW),
    ] = None,
    json: Annotated[
        str | None, _option("All numbers, to a file or to - (stdout).", _OUT)
    ] = None,
    plot_to: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="A PNG of memory over the step.", rich_help_panel=_OUT
        ),
    ] = None,
    paper: Annotated[
        bool,
        typer.Option(
            "--paper",
            help="The ZeRO paper's table of model states beside the traced one.",
            rich_help_panel=_OUT,
        ),
    ] = False,
    list_presets: Annotated[
        bool, typer.Option("--list", help="List the presets and stop.")
    ] = False,
) -> None:
    """Say what a step needs on each rank, without ranks and without weights.

    Traces the real training step for any number of ranks on shapes alone, and reads
    memory, bytes on the wire, operations and a roofline time off the program.
    """
    if list_presets:
        typer.echo("\n".join(listed()))
        return
    try:
        request = Request(
            model=model,
            ranks=_ranks(ranks, mesh),
            precision=precision,  # type: ignore[arg-type] # it is checked there
            reduce=reduce,  # type: ignore[arg-type]
            seq_len=seq_len,
            batch_size=batch_size,
            microbatches=microbatches,
            remat=remat,
            layers=layers,
            device=device,
            wire_gb_per_s=wire_gb_per_s,
        )
        if paper:
            _run_paper(request, json)
            return
        stages = _STAGES if zero is None else (zero,)
        _run(request, stages, memory_gb, json, plot_to)
    except (PlanError, TraceError) as error:
        stderr = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
        print_error(stderr, str(error))
        raise typer.Exit(2) from None


def _ranks(ranks: int | None, mesh: str | None) -> int:
    if mesh is None:
        return _DEFAULT_RANKS if ranks is None else ranks
    axis, _, size = mesh.partition("=")
    if axis != "data" or not size.isdecimal():
        raise PlanError(
            f"--mesh {mesh}: steps are planned on one axis, data; type --mesh data=1024"
        )
    if ranks not in (None, int(size)):
        raise PlanError(f"--ranks {ranks} --mesh {mesh}: give one of the two")
    return int(size)


def _run(
    request: Request,
    stages: tuple[int, ...],
    memory_gb: float | None,
    json: str | None,
    plot_to: Path | None,
) -> None:
    if memory_gb is not None and memory_gb <= 0:
        raise PlanError(f"--memory-gb {memory_gb}: must be more than 0")
    for path in (plot_to, Path(json) if json not in (None, "-") else None):
        if path is not None and not path.absolute().parent.is_dir():
            raise PlanError(f"{path}: there is no directory {path.parent}; make it")
    start_s = time.perf_counter()
    planned = [plan(request, zero) for zero in stages]  # type: ignore[arg-type]
    limit_bytes = None if memory_gb is None else int(memory_gb * 1e9)
    suggestion = None
    if limit_bytes is not None:
        suggestion = suggest(request, limit_bytes, planned)
    wall_s = time.perf_counter() - start_s
    if json is not None:
        _write(as_json(request, planned, suggestion, wall_s=wall_s), json)
    if plot_to is not None:
        plot(planned, plot_to)
    if json == "-":
        return
    console = make_console()
    print_plan(console, request, planned, limit_bytes)
    if suggestion is not None and limit_bytes is not None:
        print_suggestion(console, suggestion, limit_bytes)
    console.print(f"planned in {wall_s:.1f} s")


def _run_paper(request: Request, json: str | None) -> None:
    start_s = time.perf_counter()
    rows = list(paper_rows(request))
    wall_s = time.perf_counter() - start_s
    if json is not None:
        _write(as_json(request, [], paper=rows, wall_s=wall_s), json)
    if json != "-":
        console = Console(emoji=False, highlight=False, width=_PAPER_WIDTH)
        print_paper(console, rows)
        console.print(f"planned in {wall_s:.1f} s")


def _write(text: str, where: str) -> None:
    if where == "-":
        typer.echo(text)
    else:
        Path(where).write_text(text + "\n")
