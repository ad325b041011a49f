# SPDX-License-Identifier: Apache-2.0
"""``zfunc bench deepspeed``: DeepSpeed itself and the bridge, loss by loss."""

from __future__ import annotations

import os
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from zfunc.cli.display import make_console
from zfunc.cli.ending import explain, print_error
from zfunc.cli.errors import UsageError
from zfunc.compat.comparison import Case, Compared, chosen, compare
from zfunc.compat.errors import CompatError, DifferentError
from zfunc.core.mesh import make_mesh
from zfunc.launch import Job, current_job, guarded, torchrun

_RANKS = 2


def deepspeed_command(
    steps: Annotated[int, typer.Option(help="Updates of each case.", min=6)] = 10,
    only: Annotated[
        str | None,
        typer.Option(
            help="Words that the names of cases have to have, as "
            "`zero3,bf16,clip0.5,accumulate4,OneCycle`.  [default: all 64 cases]",
            metavar="WORDS",
        ),
    ] = None,
) -> None:
    """Train with DeepSpeed and with zfunc from one JSON, and compare.

    Stages 0 to 3, float32 and bfloat16, with and without clipping, 1 and 4
    microbatches, two schedules; the same weights, data and function for both, on 2
    ranks. Ends with exit code 1 if a loss differs by more than its bound, or a learning
    rate at all. Needs the `bench` extra.
    """
    job = current_job()
    if job is None:
        raise typer.Exit(_launch(steps, only))
    raise typer.Exit(guarded(lambda: _rank(steps, only, job), usage=UsageError))


def _launch(steps: int, only: str | None) -> int:
    stderr = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    try:
        _cases(only)
    except UsageError as error:
        print_error(stderr, str(error))
        return 2
    words = [f"--steps={steps}"] + ([] if only is None else [f"--only={only}"])
    outcome = torchrun("zfunc.cli", ["bench", "deepspeed", *words], _RANKS)
    stopped = "stopped before the end: not every case was compared"
    explain(stderr, outcome, stopped, DifferentError)
    return outcome.exit_code


def _cases(only: str | None) -> tuple[Case, ...]:
    try:
        return chosen(only)
    except CompatError as error:
        raise UsageError(str(error)) from None


def _rank(steps: int, only: str | None, job: Job) -> int:
    cases = _cases(only)
    if job.world != _RANKS:
        raise UsageError(f"this job has {job.world} ranks, and the cases are for 2")
    # Read by DeepSpeed when it is imported.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    make_mesh({"data": job.world})
    console = make_console() if job.is_first else None
    try:
        found = []
        for case in cases:
            found.append(compare(case, steps))
            if console is not None and not console.is_terminal:
                console.print(f"{len(found)} of {len(cases)}: {case.name}")
        if console is not None:
            _report(console, found, steps)
        dist.barrier()  # the first rank to leave has torchrun stop the others
        different = [each.case.name for each in found if not each.is_equal]
        if different:
            raise DifferentError(
                f"{len(different)} of {len(found)} cases differ: {different[0]}"
                + (", ..." if len(different) > 1 else "")
            )
        return 0
    finally:
        dist.destroy_process_group()


def _report(console: Console, found: list[Compared], steps: int) -> None:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for name in ("losses apart", "bound", "learning rates", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        table.add_row(
            each.case.name,
            f"{each.difference:.1e}",
            f"{each.bound:.1e}",
            "equal" if each.same_rates else "differ",
            each.verdict,
        )
    console.print(table)
    for name in ("fp32", "bf16"):
        rows = [each for each in found if each.case.precision == name]
        if rows:
            worst = max(each.difference for each in rows)
            console.print(
                f"{name}: {len(rows)} cases of {steps} steps, losses at most "
                f"{worst:.1e} apart"
            )
