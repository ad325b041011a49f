# SPDX-License-Identifier: Apache-2.0
"""``zfunc bench``: its options, its ranks, and what it says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from zfunc.bench import (
    PRESETS,
    BenchError,
    Choice,
    LossesDifferError,
    Plan,
    Result,
    check_installed,
    choose,
    plot_result,
    preset,
    print_result,
    run,
    write_csv,
    write_json,
)
from zfunc.bench.contenders import available
from zfunc.cli.bench_deepspeed import deepspeed_command
from zfunc.cli.display import make_console
from zfunc.cli.ending import explain, print_error
from zfunc.cli.errors import Problem, UsageError, flag
from zfunc.launch import Job, current_job, guarded, torchrun

T = TypeVar("T")

_MEASURED, _WRITTEN = "What is measured", "What is written"
_MODELS = "; ".join(f"`{p.name}`: {p.why}" for p in PRESETS)

bench_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Measure zfunc beside its peers.",
)


bench_app.command("deepspeed")(deepspeed_command)


@bench_app.callback()
def _bench() -> None:
    """Measure zfunc beside its peers."""


class Request(NamedTuple):
    """What was asked for, by the names of the options."""

    model: str
    nproc: int
    threads: int
    rounds: int
    steps: int
    warmup: int
    contenders: str | None
    json: Path | None
    csv: Path | None
    plot: Path | None

    def arguments(self) -> list[str]:
        """The same request as command-line arguments, for the ranks.

        Examples:
          >>> request = Request(
          ...     "small", 2, 1, 3, 15, 3, None, Path("a.json"), None, None
          ... )
          >>> request.arguments()[-2:]
          ['--warmup=3', '--json=a.json']
        """
        given = {n: v for n, v in self._asdict().items() if v is not None}
        return ["bench", "step", *(f"{flag(n)}={v}" for n, v in given.items())]


@bench_app.command()
def step(
    model: Annotated[
        str, typer.Option(help=_MODELS, rich_help_panel=_MEASURED)
    ] = "small",
    nproc: Annotated[
        int | None,
        typer.Option(
            help="Ranks. On 1, zfunc's jit beside torch in one process; on more, the "
            "stages of ZeRO beside DDP, FSDP2 and DeepSpeed.  "
            "[default: the model's own, 1 or 2]",
            min=1,
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Of each rank.  [default: 2 on 1 rank, else 1]",
            min=1,
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    rounds: Annotated[
        int,
        typer.Option(
            help="Passes over all contenders, each beginning with another one.",
            min=1,
            rich_help_panel=_MEASURED,
        ),
    ] = 3,
    steps: Annotated[
        int,
        typer.Option(
            help="Steps whose losses are compared, and timed steps of each round.",
            min=3,
            rich_help_panel=_MEASURED,
        ),
    ] = 15,
    warmup: Annotated[
        int,
        typer.Option(
            help="Steps of each contender before the timed ones of each round.",
            min=0,
            rich_help_panel=_MEASURED,
        ),
    ] = 3,
    contenders: Annotated[
        str | None,
        typer.Option(
            help=f"Some of {', '.join(c.name for c in available(2))}; with --nproc 1 "
            f"of {', '.join(c.name for c in available(1))}.  [default: all]",
            metavar="A,B,C",
            rich_help_panel=_MEASURED,
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="All that was measured.", rich_help_panel=_WRITTEN),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="A row for each loss and each timed step.", rich_help_panel=_WRITTEN
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="A PNG of the medians.", rich_help_panel=_WRITTEN),
    ] = None,
) -> None:
    """Time training steps of zfunc and of its peers.

    The same model, data, optimizer and first weights for all of them, in the same
    processes, in interleaved rounds. Ends with exit code 1 if the losses differ: then
    the contenders did not do the same work.

    Starts its own ranks; under `torchrun` it is one of them.
    """
    own = next((p.nproc for p in PRESETS if p.name == model), 2)
    nproc = nproc or own
    threads = threads or (2 if nproc == 1 else 1)
    request = Request(
        model, nproc, threads, rounds, steps, warmup, contenders, json, csv, plot
    )
    job = current_job()
    if job is None:
        raise typer.Exit(_launch(request))
    raise typer.Exit(guarded(lambda: _rank(request, job), usage=UsageError))


def _launch(request: Request) -> int:
    stderr = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    try:
        resolve(request)
    except UsageError as error:
        print_error(stderr, str(error))
        return 2
    os.environ["OMP_NUM_THREADS"] = str(request.threads)
    outcome = torchrun("zfunc.cli", request.arguments(), request.nproc)
    explain(
        stderr,
        outcome,
        "stopped before the end: nothing was written",
        LossesDifferError,
    )
    return outcome.exit_code


def _rank(request: Request, job: Job) -> int:
    if request.nproc != job.world:
        raise UsageError(
            [Problem(f"--nproc {request.nproc}", f"this job has {job.world} ranks")]
        )
    plan, choice = resolve(request)
    console = make_console() if job.is_first else None
    try:
        result = _measure(plan, choice, job, console)
        if console is not None:
            _report(console, request, result)
        if dist.is_initialized():
            dist.barrier()  # the first rank to leave has torchrun stop the others
        if not result.loss_difference.is_small:
            raise LossesDifferError("the losses differ: the times cannot be compared")
        return 0
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def resolve(request: Request) -> tuple[Plan, Choice]:
    """What is measured, and who takes part.

    Args:
      request: What was typed.

    Raises:
      UsageError: Something in it cannot be used; all of that at once.
    """
    problems = list(_place_problems(request))

    def tried(option: str, find: Callable[[], T]) -> T | None:
        try:
            return find()
        except BenchError as error:
            problems.append(Problem(option, str(error)))
            return None

    names = None if request.contenders is None else request.contenders.split(",")
    tried("--model", check_installed)
    model = tried("--model", lambda: preset(request.model))
    choice = tried("--contenders", lambda: choose(names, request.nproc))
    if problems or model is None or choice is None:
        raise UsageError(problems)
    r = request
    return Plan(model, r.threads, r.rounds, r.steps, r.warmup), choice


def _place_problems(request: Request) -> Iterator[Problem]:
    gpus = torch.cuda.device_count()
    if gpus and request.nproc > gpus:
        yield Problem(f"--nproc {request.nproc}", f"there are {gpus} GPUs")
    for name in ("json", "csv", "plot"):
        path = getattr(request, name)
        if path is None:
            continue
        what = f"{flag(name)} {path}"
        if path.is_dir():
            yield Problem(what, "is a directory: name a file in it")
        elif not path.parent.is_dir():
            yield Problem(what, f"there is no directory {path.parent}: make it first")


def _measure(plan: Plan, choice: Choice, job: Job, console: Console | None) -> Result:
    if console is None:
        return run(plan, choice, job)
    if not console.is_terminal:
        return run(plan, choice, job, console.print)
    with console.status("starting") as status:
        return run(plan, choice, job, status.update)


def _report(console: Console, request: Request, result: Result) -> None:
    print_result(console, result)
    if request.json is not None:
        write_json(request.json, result)
    if request.csv is not None:
        write_csv(request.csv, result)
    if request.plot is not None:
        plot_result(request.plot, result)
