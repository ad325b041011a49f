# SPDX-License-Identifier: Apache-2.0
"""What a command says of a job that did not come to its end."""

from __future__ import annotations

from rich.console import Console

from zfunc.launch import Outcome


def print_error(stderr: Console, text: str) -> None:
    """Print a message as an error.

    Args:
      stderr: Where to.
      text: As it is: no markup in it is read.
    """
    stderr.print("[bold red]error:[/] ", end="")
    stderr.print(text, markup=False)


def explain(
    stderr: Console, outcome: Outcome, stopped: str, *answers: type[Exception]
) -> None:
    """Print one message about a job that did not finish.

    Args:
      stderr: Where to.
      outcome: How the job ended. Nothing is printed of one that finished.
      stopped: The message if the job was told to stop.
      answers: Errors that are the command's answer, of which no traceback is shown,
        like mistakes in how it was called.
    """
    failure = outcome.failure
    if outcome.exit_code == 0:
        return
    if outcome.stopped or failure is None:
        print_error(stderr, stopped)
        return
    name, _, message = failure.message.partition(": ")
    if failure.exitcode == 2 or name in {answer.__name__ for answer in answers}:
        print_error(stderr, message or str(failure))
        return
    if failure.traceback:
        stderr.print(failure.traceback, markup=False)
    print_error(stderr, str(failure))
