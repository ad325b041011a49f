# SPDX-License-Identifier: Apache-2.0
"""Being asked to stop: a rank remembers it, the launcher passes it on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One stop may arrive twice: from the launcher, and from whoever signals the whole job.
_SAME_STOP_S = 1.0


class StopRequest:
    """Within it, the first signal to stop is remembered, and a later one kills.

    Signals are those that stop a process: SIGINT, SIGTERM, SIGHUP. Only the main
    thread can use it.

    Examples:
      >>> with StopRequest() as stop:
      ...     os.kill(os.getpid(), signal.SIGINT)
      ...     stop.signal
      2
    """

    def __init__(self) -> None:
        self._received: list[tuple[int, float]] = []
        self._before: dict[int, Any] = {}

    @property
    def signal(self) -> int:
        """The number of the first signal; 0 if there was none."""
        return self._received[0][0] if self._received else 0

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            if _hangs_on(number):
                continue
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._received and now - self._received[0][1] > _SAME_STOP_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received.append((number, now))


@contextmanager
def forwarding() -> Iterator[list[int]]:
    """Within it, signals to stop go to the child processes.

    The first is passed on as SIGTERM, which ends a child that is still starting without
    a word; the second kills the children at once. Without children it is
    KeyboardInterrupt.

    Yields:
      The numbers of the signals so far, growing.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        children = child_processes(os.getpid())
        for pid in children:
            _kill(pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)
        if not children:
            raise KeyboardInterrupt

    # nohup has SIGHUP ignored, and means it.
    numbers = [n for n in STOP_SIGNALS if not _hangs_on(n)]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _hangs_on(number: int) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def child_processes(parent_pid: int) -> list[int]:
    """The process ids of a process's children that have not ended, from /proc.

    Args:
      parent_pid: The process.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold spaces and parentheses: state, parent.
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if int(parent) == parent_pid and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


def _kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
