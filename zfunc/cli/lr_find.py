# SPDX-License-Identifier: Apache-2.0
"""``zfunc lr-find``: its options, its ranks, and what it says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

from zfunc.cli.command import RANKS_WITHOUT_GPU
from zfunc.cli.command import Request as TrainRequest
from zfunc.cli.command import resolve as resolve_training
from zfunc.cli.config import TrainConfig
from zfunc.cli.display import PLAIN_LINES, make_console
from zfunc.cli.ending import explain, print_error
from zfunc.cli.errors import Problem, UsageError
from zfunc.cli.lr_curve import MARGIN, Curve, Point, Suggestion, as_json, draw
from zfunc.cli.lr_curve import suggestion as read_off
from zfunc.cli.lr_sweep import MIN_STEPS, Sweep, measure
from zfunc.launch import Job, current_job, guarded, torchrun

_SWEEP, _RUN, _MODEL = "Sweep", "Run", "Model"
_DEFAULT, _SWEPT, _STEPS = TrainConfig(), Sweep(), 120
JSON_NAME, PNG_NAME = "lr_find.json", "lr_find.png"


class Request(NamedTuple):
    """What was typed: the options of the training by their fields, and the sweep."""

    given: dict[str, Any]
    sweep: Sweep
    out: Path

    def arguments(self, nproc: int) -> list[str]:
        """The same request as command-line arguments, for the ranks.

        Examples:
          >>> Request({"steps": 30}, Sweep(), Path("o")).arguments(2)[:4]
          ['lr-find', '--out=o', '--steps=30', '--nproc=2']
        """
        training = TrainRequest({**self.given, "nproc": nproc}, self.out)
        sweep = TrainRequest(self.sweep._asdict(), self.out)
        return ["lr-find", *training.arguments()[1:], *sweep.arguments()[2:]]


def _field(name: str, panel: str) -> Any:
    """The option of a field of the configuration, as ``zfunc train`` has it."""
    text = TrainConfig.model_fields[name].description or ""
    return typer.Option(
        help=text, rich_help_panel=panel, show_default="[default:" not in text
    )


def _option(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_SWEEP)


def lr_find_command(
    ctx: typer.Context,
    min_lr: Annotated[float, _option("The first learning rate.")] = _SWEPT.min_lr,
    max_lr: Annotated[float, _option("The last learning rate.")] = _SWEPT.max_lr,
    steps: Annotated[int, _option("Optimizer steps from one to the other.")] = _STEPS,
    linear: Annotated[
        bool,
        _option(
            "Raise the rate by equal amounts, as DeepSpeed's range test, and not by "
            "equal factors."
        ),
    ] = _SWEPT.linear,
    smoothing: Annotated[
        float, _option("Of the loss: the weight of its past, at least 0, below 1.")
    ] = _SWEPT.smoothing,
    diverged_by: Annotated[
        float,
        _option("Stop when the smoothed loss is this many times its lowest value."),
    ] = _SWEPT.diverged_by,
    out: Annotated[
        Path,
        typer.Option(
            help=f"Directory for {JSON_NAME} and {PNG_NAME}, which are replaced if "
            "they are there.",
            rich_help_panel=_SWEEP,
        ),
    ] = Path("runs/lr-find"),
    nproc: Annotated[int, _field("nproc", _RUN)] = _DEFAULT.nproc,
    data: Annotated[Path | None, _field("data", _RUN)] = None,
    zero: Annotated[int, _field("zero", _RUN)] = _DEFAULT.zero,
    precision: Annotated[str, _field("precision", _RUN)] = _DEFAULT.precision,
    microbatches: Annotated[int, _field("microbatches", _RUN)] = _DEFAULT.microbatches,
    remat: Annotated[bool, _field("remat", _RUN)] = _DEFAULT.remat,
    backend: Annotated[str | None, _field("backend", _RUN)] = None,
    batch_size: Annotated[int, _field("batch_size", _RUN)] = _DEFAULT.batch_size,
    clip: Annotated[float, _field("clip", _RUN)] = _DEFAULT.clip,
    weight_decay: Annotated[float, _field("weight_decay", _RUN)] = (
        _DEFAULT.weight_decay
    ),
    seed: Annotated[int, _field("seed", _RUN)] = _DEFAULT.seed,
    d_model: Annotated[int, _field("d_model", _MODEL)] = _DEFAULT.d_model,
    layers: Annotated[int, _field("layers", _MODEL)] = _DEFAULT.layers,
    heads: Annotated[int, _field("heads", _MODEL)] = _DEFAULT.heads,
    kv_heads: Annotated[int | None, _field("kv_heads", _MODEL)] = None,
    seq_len: Annotated[int, _field("seq_len", _MODEL)] = _DEFAULT.seq_len,
) -> None:
    """Find a learning rate: raise it until the training diverges, and read the losses.

    Trains the model of `zfunc train` from its first weights while the rate rises: by
    default it doubles over equal numbers of steps, one `lr_range_test` after the other.
    Draws the loss against the rate, and suggests a value for `zfunc train --lr`. Starts
    its own ranks; `--nproc 1` starts none.
    """
    typed = {
        name: value
        for name, value in ctx.params.items()
        if name in TrainConfig.model_fields and name != "steps" and _typed(ctx, name)
    }
    sweep = Sweep(min_lr, max_lr, linear, smoothing, diverged_by)
    request = Request({**typed, "steps": steps}, sweep, out)
    job = current_job()
    if job is not None:
        raise typer.Exit(guarded(lambda: _rank(request, job), usage=UsageError))
    stderr = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    try:
        raise typer.Exit(_launch(request, stderr))
    except UsageError as error:
        print_error(stderr, str(error))
        raise typer.Exit(2) from None


def _typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def resolve(request: Request, *, nproc: int) -> TrainConfig:
    """The configuration of the training that is swept.

    Args:
      request: What was typed.
      nproc: The number of ranks if none was given.

    Raises:
      UsageError: Something in it cannot be used; all of that at once.
    """
    steps = request.given["steps"]
    enough = {**request.given, "steps": max(steps, MIN_STEPS)}  # it is checked below
    training = TrainRequest(enough, request.out)
    config, problems = resolve_training(training, nproc=nproc)
    problems += request.sweep.problems(steps)
    if problems or config is None:
        raise UsageError(problems)
    return config


def place_problems(out: Path) -> Iterator[Problem]:
    """What stands in the way of writing the two files; nothing is written.

    Args:
      out: Their directory.
    """
    place = out.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        yield Problem(f"--out {out}", f"{place} is not a directory")
    elif not os.access(place, os.W_OK | os.X_OK):
        yield Problem(f"--out {out}", f"{place} cannot be written to")
    for name in (JSON_NAME, PNG_NAME):
        if (out / name).is_dir():
            yield Problem(f"--out {out}", f"{name} in it is a directory")


def _launch(request: Request, stderr: Console) -> int:
    gpus = torch.cuda.device_count()
    problems = list(place_problems(request.out))
    try:
        config = resolve(request, nproc=gpus or RANKS_WITHOUT_GPU)
    except UsageError as error:
        raise UsageError([*error.problems, *problems]) from None
    if gpus and config.nproc > gpus:
        problems.append(Problem(f"--nproc {config.nproc}", f"there are {gpus} GPUs"))
    if problems:
        raise UsageError(problems)
    if config.nproc == 1:
        return _sweep(request, config, Job(rank=0, world=1))
    outcome = torchrun("zfunc.cli", request.arguments(config.nproc), config.nproc)
    explain(stderr, outcome, "stopped before the end: nothing was written")
    return outcome.exit_code


def _rank(request: Request, job: Job) -> int:
    asked = request.given.get("nproc", job.world)
    if asked != job.world:
        why = f"this job has {job.world} ranks; leave it out inside torchrun"
        raise UsageError([Problem(f"--nproc {asked}", why)])
    config = resolve(request, nproc=job.world)
    problems = list(place_problems(request.out)) if job.is_first else []
    if problems:
        raise UsageError(problems)
    return _sweep(request, config, job)


def _sweep(request: Request, config: TrainConfig, job: Job) -> int:
    """Measure; rank 0 writes and says what was found."""
    if not job.is_first:
        measure(config, request.sweep, job)
        return 0
    console = make_console()
    every = max(1, config.steps // PLAIN_LINES)

    def tell(point: Point) -> None:
        if point.step % every == 0 or point.step in (1, config.steps):
            console.print(
                f"step {point.step:>{len(str(config.steps))}}/{config.steps}  "
                f"lr {point.lr:.2e}  loss {point.loss:.4f}  "
                f"smoothed {point.smoothed:.4f}"
            )

    curve = measure(config, request.sweep, job, tell)
    read = read_off(curve)
    write(request.out, curve, read, config, request.sweep)
    for line in said(curve, read):
        console.print(line, soft_wrap=True)
    console.print(
        f"written to {request.out}: {JSON_NAME}, {PNG_NAME}",
        markup=False,
        soft_wrap=True,
    )
    return 0


def write(
    out: Path, curve: Curve, read: Suggestion, config: TrainConfig, sweep: Sweep
) -> None:
    """Write the two files: first both under other names, then both are renamed.

    Args:
      out: Their directory; made if it is not there.
      curve: What was measured.
      read: Its suggestion.
      config: Of the training.
      sweep: Of the rates.

    Raises:
      UsageError: They cannot be written.
    """
    about = {"config": config.model_dump(mode="json"), "sweep": sweep._asdict()}
    names = (JSON_NAME, PNG_NAME)
    temporary = [out / f".{name}.{os.getpid()}.tmp" for name in names]
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            temporary[0].write_text(as_json(curve, read, about), encoding="utf-8")
            draw(temporary[1], curve, read)
            for path, name in zip(temporary, names, strict=True):
                path.replace(out / name)
        finally:
            for path in temporary:
                path.unlink(missing_ok=True)
    except OSError as error:
        why = f"cannot be written: {error.strerror or error}"
        raise UsageError([Problem(f"--out {out}", why)]) from error


def said(curve: Curve, read: Suggestion) -> Iterator[str]:
    r"""What was found, in a few lines.

    Args:
      curve: What was measured.
      read: Its suggestion.

    Examples:
      >>> curve = Curve((Point(1, 0.1, 2.0, 2.0), Point(2, 0.2, 3.0, 2.5)), None)
      >>> print(*said(curve, read_off(curve)), sep="\n")
      the loss did not diverge up to a learning rate of 0.2
      the loss did not fall: try a lower --min-lr, or more --steps
    """
    if curve.diverged is None:
        lr = curve.points[-1].lr
        yield f"the loss did not diverge up to a learning rate of {lr:.3g}"
    else:
        step, lr = curve.diverged
        yield f"the loss diverged at step {step}, at a learning rate of {lr:.3g}"
    if read.lr is None:
        yield "the loss did not fall: try a lower --min-lr, or more --steps"
        return
    yield f"it falls most steeply at {read.steepest_lr:.3g}, and is lowest at " + (
        f"{read.lowest_lr:.3g}"
    )
    if read.last_lr is not None:
        tenth = read.last_lr / MARGIN
        yield f"a tenth of the last rate before the divergence is {tenth:.3g}"
    yield f"suggestion: zfunc train --lr {read.lr:.2g}"
