# SPDX-License-Identifier: Apache-2.0
"""A rank's side of a job: who it is, and how it says what went wrong."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from zfunc.launch.failures import LOST_PEER


@dataclass(frozen=True)
class Job:
    """This process's place in the job that torchrun started.

    Examples:
      >>> Job(rank=1, world=4).is_first
      False
    """

    rank: int
    world: int

    @property
    def is_first(self) -> bool:
        """True on the rank that writes files and talks."""
        return self.rank == 0


def current_job() -> Job | None:
    """The job of this process, or None outside torchrun.

    Raises:
      ValueError: RANK and WORLD_SIZE are set to something that is not a rank.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world}: not 0 <= rank < world")
    return Job(rank, world)


def guarded(work: Callable[[], int], usage: type[Exception]) -> int:
    """Run a rank's work; what it raises goes to the launcher, not to the terminal.

    Args:
      work: Returns an exit code.
      usage: The error of a user's mistake.

    Returns:
      ``work()``; 2 for a user's mistake; ``LOST_PEER`` if another rank went away; 130
      for Ctrl-C; 1 for any other error.
    """
    try:
        return work()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        get_error_handler().record_exception(error)
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            traceback.print_exc(limit=0 if isinstance(error, usage) else None)
        if isinstance(error, usage):
            return 2
        return LOST_PEER if _lost_peer(error) else 1


def leave(code: int | str | None) -> NoReturn:
    """End a rank at once, its output written, without finalizing the interpreter.

    Gloo's threads may still hold the tensors of the last collectives. Giving them back
    to an interpreter that is finalizing aborts the process (torch 2.13), after all its
    work is done: "terminate called without an active exception".

    Args:
      code: As of ``SystemExit``.
    """
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _lost_peer(error: BaseException | None) -> bool:
    """Whether a collective failed because its other end is gone."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, dist.DistError) or (
            type(error) is RuntimeError and ("gloo" in text or "connection" in text)
        ):
            return True
        error = error.__cause__
    return False
