# SPDX-License-Identifier: Apache-2.0
"""Saves that are running in the background of this process: found by looking."""

from __future__ import annotations

import threading


class SavingThread(threading.Thread):
    """A thread that writes a checkpoint; a process that ends waits for it.

    Example:
      >>> SavingThread(target=print).daemon
      False
    """


def wait_for_running() -> None:
    """Return when no save runs in the background of this process, however it ended.

    Saves write one after the other: one group of ranks serves them all, and a save
    removes what an earlier one that was killed has left.

    Example:
      >>> wait_for_running()
    """
    for thread in threading.enumerate():
        if isinstance(thread, SavingThread):
            thread.join()
