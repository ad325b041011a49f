# SPDX-License-Identifier: Apache-2.0
"""``zfunc bench kernels``: its options, and what it says and writes."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from zfunc.bench.errors import BenchError
from zfunc.bench.kernel_case import Case
from zfunc.bench.kernel_clock import make_clock
from zfunc.bench.kernels import ROOF_NUMEL, Found, Plan, run_kernels
from zfunc.bench.kernels_compiled import (
    compiled_page,
    violation_lines,
    write_compiled,
)
from zfunc.bench.kernels_cpu import cpu_cases
from zfunc.bench.kernels_layers import FULL, layer_cases
from zfunc.bench.kernels_optimizers import optimizer_cases
from zfunc.bench.kernels_report import plot_found, print_found, write_found
from zfunc.cli.display import make_console
from zfunc.cli.ending import print_error
from zfunc.cli.errors import Problem, UsageError
from zfunc.kernels import compile_only as gate


def bench_kernels(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory to write to: kernels.csv, kernels.png, "
            "kernels_compile_only.csv and kernels_compile_only.md."
        ),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Only what has a name that begins so, as `adamw` or `rms_norm/forw`.",
            metavar="PREFIX",
        ),
    ] = "",
    rounds: Annotated[
        int, typer.Option(help="Passes over all ways of a case.", min=1)
    ] = 5,
    calls: Annotated[
        int, typer.Option(help="Timed calls of a way in a round.", min=1)
    ] = 5,
    threads: Annotated[int, typer.Option(help="Of torch, on a CPU.", min=1)] = 2,
    compile_only: Annotated[
        bool | None,
        typer.Option(
            "--compile-only/--no-compile-only",
            help="Measure nothing, only compile what ships for sm_80, sm_90 and "
            "sm_100; or leave that out.  [default: both]",
        ),
    ] = None,
) -> None:
    """Time the kernels beside torch and Liger, and compile what ships.

    On a GPU every Triton kernel, against the bandwidth of a copy in the same run; on a
    CPU the paths that are faster than torch's there. Ends with exit code 1 if a case
    fails or results differ, with the others still measured, or if a configuration
    spills.
    """
    stderr = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    console = make_console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        cases = [] if compile_only else list(chosen(device, only))
        names = () if compile_only is False else compiled_names(only)
        check(out, only, bool(cases or names))
        plan = Plan(rounds, calls, ROOF_NUMEL)
        failed = _measure(console, stderr, cases, device, plan, threads, out)
        failed |= bool(names) and _compile(console, stderr, only, out)
    except UsageError as error:
        print_error(stderr, str(error))
        raise typer.Exit(2) from None
    except (BenchError, RuntimeError) as error:
        print_error(stderr, str(error))
        raise typer.Exit(1) from None
    raise typer.Exit(int(failed))


def chosen(device: torch.device, only: str) -> Iterator[Case]:
    """The cases of a device whose names begin so.

    Args:
      device: A CPU or a GPU.
      only: The prefix.
    """
    if device.type == "cuda":
        cases = chain(optimizer_cases(FULL.num_params), layer_cases(FULL))
    else:
        cases = chain(cpu_cases())
    return (case for case in cases if case.name.startswith(only))


def compiled_names(only: str) -> tuple[str, ...]:
    """The configurations that ship whose names begin so.

    Args:
      only: The prefix.
    """
    return tuple(one.name for one in gate.shipped() if one.name.startswith(only))


def check(out: Path | None, only: str, anything: bool) -> None:
    """Raise if there is nothing to do, or no place to write to.

    Args:
      out: The directory.
      only: What was asked for.
      anything: Whether something has such a name.

    Raises:
      UsageError: All that is wrong.
    """
    problems = []
    if not anything:
        problems.append(
            Problem(f"--only {only}", "nothing that is measured here begins so")
        )
    if out is not None and not out.is_dir():
        problems.append(Problem(f"--out {out}", "there is no such directory: make it"))
    if problems:
        raise UsageError(problems)


def _measure(
    console: Console,
    stderr: Console,
    cases: list[Case],
    device: torch.device,
    plan: Plan,
    threads: int,
    out: Path | None,
) -> bool:
    """Measure and report; whether a case failed."""
    if not cases:
        return False

    def keep(found: list[Found]) -> None:
        if out is not None:
            write_found(out / "kernels.csv", found)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, failures = run_kernels(
            cases, make_clock(device), plan, stderr.print, keep
        )
    finally:
        torch.set_num_threads(before)
    print_found(console, found)
    if out is not None and found:
        plot_found(out / "kernels.png", found)
    for failure in failures:
        print_error(stderr, failure)
    return bool(failures)


def _compile(console: Console, stderr: Console, only: str, out: Path | None) -> bool:
    """Compile and report; whether something has violations."""
    stderr.print("compiling what ships")
    prefixes = (only,) if only else ()
    rows: list[Any] = gate.report(prefixes, tuple(gate.ARCHITECTURES))
    page = compiled_page(rows, importlib.metadata.version("triton"))
    if out is None:
        console.print(page, markup=False, soft_wrap=True)
    else:
        (out / "kernels_compile_only.md").write_text(page, encoding="utf-8")
        write_compiled(out / "kernels_compile_only.csv", rows)
    wrong = violation_lines(rows)
    for line in wrong:
        console.print(line, markup=False)
    return bool(wrong)
