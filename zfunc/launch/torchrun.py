# SPDX-License-Identifier: Apache-2.0
"""Running a module on several ranks of this machine: torchrun, in this process."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from zfunc.launch.failures import LOST_PEER, RankFailure, root_cause
from zfunc.launch.signals import STOP_SIGNALS, forwarding

_STOPPED = tuple(128 + number for number in STOP_SIGNALS)
_KILLED = tuple(-number for number in (*STOP_SIGNALS, signal.SIGKILL))


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
      signal: The first signal that this process was sent meanwhile; 0 if none was.
      failure: The rank that ended the job; None if none failed.
      finished: Whether every rank came to the end of its work.

    Examples:
      >>> Outcome(0, None, finished=True).exit_code
      0
      >>> Outcome(2, RankFailure(0, 1, 143, "", ""), finished=False).exit_code
      130
    """

    signal: int
    failure: RankFailure | None
    finished: bool

    @property
    def stopped(self) -> bool:
        """Whether it ended because it was told to, and not because a rank failed."""
        return self.exit_code in _STOPPED

    @property
    def saved(self) -> bool:
        """Whether the ranks ended by themselves when they were told to stop."""
        return self.failure is not None and self.failure.exitcode in _STOPPED

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 + n for signal n; 2 for a user's mistake; else 1."""
        if self.finished:
            return 0
        code = -self.signal if self.failure is None else self.failure.exitcode
        if self.signal and code in (*_STOPPED, *_KILLED, LOST_PEER):
            return 128 + self.signal
        return code if code == 2 or code in _STOPPED else 1


def torchrun(module: str, arguments: Sequence[str], nproc: int) -> Outcome:
    """Run ``python -m module arguments`` on ``nproc`` ranks and wait for their end.

    One thread per rank, unless OMP_NUM_THREADS says otherwise. Signals that stop are
    passed on to the ranks, which may take the time they need to save; a second one
    kills them. If a rank fails, the others are stopped. Ranks write to this process's
    terminal.

    Args:
      module: What each rank runs; its errors are best given to ``guarded``.
      arguments: Of the command line.
      nproc: Number of ranks.

    Returns:
      How the job ended. Nothing is printed.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="zfunc-") as logs, _quiet():
        parsed = parse_args(
            [
                *("--standalone", "--nproc-per-node", str(nproc), "--log-dir", logs),
                # The others are ours: torchrun gives ranks 30 s to save, then kills.
                *("--signals-to-handle", "SIGQUIT", "--module", module),
            ]
        )
        # Not parsed there: it takes --nproc for an abbreviation of its own option.
        parsed.training_script_args = list(arguments)
        failure, finished = None, False
        with forwarding() as received:
            try:
                run(parsed)
                finished = True
            except ChildFailedError as error:
                failure = root_cause(error)
            except KeyboardInterrupt:
                if not received:
                    raise
        return Outcome(received[0] if received else 0, failure, finished)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchrun's own log of a failure: the outcome says it in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
