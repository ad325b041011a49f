# SPDX-License-Identifier: Apache-2.0
"""``zfunc plan``: its options, and what it prints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from zfunc.cli.display import make_console
from zfunc.plan import (
    PlanError,
    Request,
    as_json,
    listed,
    plan,
    plot,
    print_plan,
    print_suggestion,
    suggest,
)

_WHAT, _HOW, _OUT = "What is trained", "How", "What is written"
_STAGES = (0, 1, 2, 3)


def _option(text: str, panel: str, **kwargs: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, **kwargs)


def plan_command(
    model: Annotated[
        str,
        _option("A preset (--list) or your.module:function.", _WHAT),
    ] = "7.5b",
    ranks: Annotated[int, _option("Size of the mesh axis data.", _HOW)] = 64,
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
            ranks=ranks,
            precision=precision,  # type: ignore[arg-type] # it is checked there
            reduce=reduce,  # type: ignore[arg-type]
            seq_len=seq_len,
            batch_size=batch_size,
            microbatches=microbatches,
            remat=remat,
            layers=layers,
            device=device,
        )
        stages = _STAGES if zero is None else (zero,)
        _run(request, stages, memory_gb, json, plot_to)
    except PlanError as error:
        stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        stderr.print("[bold red]error:[/] ", end="")
        stderr.print(str(error), markup=False)
        raise typer.Exit(2) from None


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
    suggestion = None if limit_bytes is None else suggest(request, limit_bytes)
    text = as_json(request, planned, suggestion)
    if json == "-":
        typer.echo(text)
        return
    console = make_console()
    print_plan(console, request, planned)
    if suggestion is not None and limit_bytes is not None:
        print_suggestion(console, suggestion, limit_bytes)
    if json is not None:
        Path(json).write_text(text + "\n")
    if plot_to is not None:
        plot(planned, plot_to)
    console.print(f"traced in {time.perf_counter() - start_s:.1f} s")
