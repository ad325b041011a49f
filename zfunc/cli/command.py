# SPDX-License-Identifier: Apache-2.0
"""``zfunc train``: check everything, start the ranks, say how it ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from zfunc.cli.config import TrainConfig, conflicts, problems_of
from zfunc.cli.corpus import corpus_problems
from zfunc.cli.ending import print_error
from zfunc.cli.errors import Problem, UsageError, flag
from zfunc.cli.rundir import RunDir
from zfunc.cli.worker import run_rank
from zfunc.launch import (
    Job,
    Outcome,
    current_job,
    guarded,
    torchrun,
)

RANKS_WITHOUT_GPU = 2


@dataclass(frozen=True)
class Request:
    """What was typed: only the options that were given, by the name of their field."""

    given: Mapping[str, Any]
    out: Path
    resume: bool = False
    overwrite: bool = False

    def arguments(self) -> list[str]:
        """The same request as command-line arguments, for the ranks.

        Examples:
          >>> Request({"remat": False, "steps": 3}, Path("o")).arguments()
          ['train', '--out=o', '--no-remat', '--steps=3']
        """
        words = ["train", f"--out={self.out}"]
        words += [flag(n) for n in ("resume", "overwrite") if getattr(self, n)]
        for name, value in self.given.items():
            if isinstance(value, bool):
                words.append(flag(name if value else f"no_{name}"))
            else:
                words.append(f"{flag(name)}={value}")
        return words


def train_command(request: Request) -> int:
    """Run ``zfunc train``: as the launcher, or as a rank inside torchrun.

    Args:
      request: What was typed.

    Returns:
      The exit code.
    """
    job = current_job()
    if job is None:
        return _launch(request)
    return guarded(lambda: _rank(request, job), usage=UsageError)


def _rank(request: Request, job: Job) -> int:
    run = RunDir(request.out)
    asked = request.given.get("nproc", job.world)
    if asked != job.world:
        why = f"this job has {job.world} ranks; leave it out inside torchrun"
        raise UsageError([Problem(f"--nproc {asked}", why)])
    config, problems = resolve(request, nproc=job.world)
    if job.is_first:  # the others must not see the files that it makes
        problems += place_problems(request)
    if problems or config is None:
        raise UsageError(problems)
    if job.is_first:
        run.prepare(config, overwrite=request.overwrite)
    return run_rank(config, run, job, resume=request.resume)


def _launch(request: Request) -> int:
    stderr = Console(emoji=False, stderr=True, highlight=False, soft_wrap=True)
    try:
        config, problems = resolve(request, nproc=_default_nproc())
        problems += place_problems(request)
        if config is not None:
            problems += _device_problems(config)
        if problems or config is None:
            raise UsageError(problems)
    except UsageError as error:
        print_error(stderr, str(error))
        return 2
    outcome = torchrun("zfunc.cli", request_for_ranks(request, config), config.nproc)
    _explain(stderr, outcome, RunDir(request.out))
    return outcome.exit_code


def request_for_ranks(request: Request, config: TrainConfig) -> list[str]:
    """The arguments of the ranks: what was typed, with the number of ranks."""
    given = {**request.given, "nproc": config.nproc}
    ranks = Request(given, request.out, request.resume, request.overwrite)
    return ranks.arguments()


def resolve(
    request: Request, *, nproc: int
) -> tuple[TrainConfig | None, list[Problem]]:
    """The configuration that a request asks for, and all that is wrong with it.

    Args:
      request: What was typed.
      nproc: The number of ranks if none was given; the stored one if a run goes on.

    Returns:
      The configuration (None if its options are not valid), and the problems.

    Raises:
      UsageError: There is no run to resume.
    """
    problems = []
    stored: dict[str, Any] = {"nproc": nproc}
    if request.resume:
        before = RunDir(request.out).stored_config()
        stored = before.model_dump()
        if request.overwrite:
            problems.append(Problem("--resume --overwrite", "give one of the two"))
    options = {**stored, **request.given}
    wrong = problems_of(options)
    config = None if wrong else TrainConfig.model_validate(options)
    problems += wrong
    if config is not None and request.resume:
        problems += conflicts(before, {n: getattr(config, n) for n in request.given})
    problems += corpus_problems(options.get("data"), config)
    return config, problems


def place_problems(request: Request) -> Iterator[Problem]:
    """What stands in the way of writing to the run's directory."""
    run = RunDir(request.out)
    if request.resume:
        return run.resume_problems()
    return run.fresh_problems(overwrite=request.overwrite)


def _default_nproc() -> int:
    return torch.cuda.device_count() or RANKS_WITHOUT_GPU


def _device_problems(config: TrainConfig) -> Iterator[Problem]:
    gpus = torch.cuda.device_count()
    if gpus and config.nproc > gpus:
        yield Problem(
            f"--nproc {config.nproc}",
            f"this machine has {gpus} GPU{'s' * (gpus > 1)}, and a rank needs one of "
            "its own",
        )


def _explain(stderr: Console, outcome: Outcome, run: RunDir) -> None:
    """One message about a job that did not finish."""
    failure = outcome.failure
    if outcome.exit_code == 0:
        return
    if stderr.is_terminal:
        stderr.show_cursor(True)  # a rank that was killed did not
    if failure is not None and failure.exitcode == 2:
        print_error(stderr, failure.message.partition(": ")[2] or str(failure))
        return
    newest = run.latest_checkpoint()
    where = (
        f"the last checkpoint is {newest}, go on with:\n  {run.resume_command}"
        if newest
        else "there is no checkpoint yet"
    )
    if not outcome.stopped:
        if failure is not None and failure.traceback:
            stderr.print(failure.traceback, markup=False)
        print_error(stderr, f"{failure or 'the launcher failed'}; {where}")
    elif not outcome.saved:
        stderr.print(f"stopped at once; {where}", markup=False)
