# SPDX-License-Identifier: Apache-2.0
"""Which rank failed first: torchrun reports all that died, also those it stopped."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
)

# Exit code of a rank that failed because another one was gone (EX_TEMPFAIL).
LOST_PEER = 75
# Deaths later than this are torchrun's doing: it kills what ignores SIGTERM.
_SAME_MOMENT_S = 5


@dataclass(frozen=True)
class RankFailure:
    """The rank that ended a job.

    Attributes:
      rank: Its global rank.
      pid: Its process.
      exitcode: As subprocess has it: negative for the number of a signal.
      message: What it raised, as text; "" if it did not say.
      traceback: Of what it raised; "" if it did not say.

    Examples:
      >>> str(RankFailure(1, 4711, -9, "", ""))
      'rank 1 (pid 4711) was killed by signal 9 (SIGKILL)'
      >>> str(RankFailure(0, 4710, 1, "ValueError: no", ""))
      'rank 0 (pid 4710) failed: ValueError: no'
    """

    rank: int
    pid: int
    exitcode: int
    message: str
    traceback: str

    def __str__(self) -> str:
        who = f"rank {self.rank} (pid {self.pid})"
        if self.exitcode < 0:
            return f"{who} was killed by signal {_named(-self.exitcode)}"
        if self.message:
            return f"{who} failed: {self.message}"
        return f"{who} exited with code {self.exitcode}"


def root_cause(error: ChildFailedError) -> RankFailure:
    """The failure that came before the others.

    A rank that lost the connection to a dead one, and one that torchrun stopped, are
    consequences, also when their deaths are noticed in the same second.

    Args:
      error: What torchrun raised.

    Returns:
      The first failure by cause, then by time, then by rank.
    """
    failures: dict[int, ProcessFailure] = error.failures
    first_s = min(failure.timestamp for failure in failures.values())

    def key(item: tuple[int, ProcessFailure]) -> tuple[bool, int, int, int]:
        rank, failure = item
        late = failure.timestamp > first_s + _SAME_MOMENT_S
        return late, _order(failure.exitcode), failure.timestamp, rank

    rank, failure = min(failures.items(), key=key)
    message, traceback = _said(failure)
    return RankFailure(rank, failure.pid, failure.exitcode, message, traceback)


def _order(exitcode: int) -> int:
    """Causes before consequences."""
    if exitcode == -signal.SIGTERM:
        return 4
    if exitcode == LOST_PEER:
        return 3
    if exitcode == -signal.SIGABRT:  # also how NCCL's watchdog ends a waiting rank
        return 2
    return 1 if exitcode > 0 else 0


def _said(failure: ProcessFailure) -> tuple[str, str]:
    """Message and traceback of the error file that the rank wrote, if it did."""
    data: Any = failure.error_file_data.get("message")
    if not isinstance(data, dict):
        return "", ""
    traceback = data.get("extraInfo", {}).get("py_callstack", "")
    return str(data.get("message", "")), str(traceback)


def _named(number: int) -> str:
    try:
        return f"{number} ({signal.Signals(number).name})"
    except ValueError:
        return str(number)
