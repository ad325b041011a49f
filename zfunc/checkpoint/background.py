# SPDX-License-Identifier: Apache-2.0
"""Saving beside the training: the step waits for a copy in memory, not for the disk."""

from __future__ import annotations

import functools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from zfunc.checkpoint.agree import Peers, own_group
from zfunc.checkpoint.draft import attempted, drafted, on_host
from zfunc.checkpoint.keep import Keep, check_keep
from zfunc.checkpoint.leaves import mesh_of
from zfunc.checkpoint.running import SavingThread, wait_for_running
from zfunc.checkpoint.save import write_checkpoint
from zfunc.core.errors import CheckpointError
from zfunc.core.state import TrainState, check_usable


class Pending:
    """A checkpoint that is being written; made by ``save_async``.

    Example:
      >>> import tempfile, torch
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> with tempfile.TemporaryDirectory() as root:
      ...     pending = save_async(root, shard(torch.ones(2), make_mesh({})))
      ...     print(pending.wait().name, pending.is_done)
      step-00000000 True
    """

    def __init__(self, what: str, result: Future[Path]) -> None:
        self._what, self._result = what, result
        self._asked = threading.Event()
        weakref.finalize(self, _tell_if_unheard, what, result, self._asked)

    def __repr__(self) -> str:
        return f"<{self._what}: {'done' if self.is_done else 'under way'}>"

    @property
    def is_done(self) -> bool:
        """Whether it is written, or has failed; does not wait."""
        return self._result.done()

    def wait(self) -> Path:
        """The step's directory, once it is on the disk on all ranks.

        Raises:
          CheckpointError: it could not be written: what ``save`` would have raised.
        """
        self._asked.set()
        return self._result.result()


def save_async(
    root: str | os.PathLike[str],
    state: TrainState,
    *,
    cursor: Any = None,
    meta: Mapping[str, Any] | None = None,
    keep: Keep | None = None,
) -> Pending:
    r"""``save``, which returns as soon as the state is copied to host memory.

    A thread compares, writes and commits while the training goes on; the ranks talk
    there in a group of their own, so their messages never meet those of a step. The
    state may be donated to the next step at once: what is saved are its values now. The
    copy takes as much host memory as this rank's part of the state,
    :math:`16 \Psi / n` bytes with two Adam moments in float32, until it is written.

    Saves go one after the other: a call waits for the one before, and so does ``save``.
    ``latest`` and ``restore`` see a checkpoint when it is complete. A process that ends
    waits for it; one that calls ``os._exit``, or destroys torch's process groups, has
    to ``wait()`` first.

    Args:
      root: as of ``save``.
      state: as of ``save``; every rank of its mesh calls, at the same point.
      cursor: as of ``save``.
      meta: as of ``save``.
      keep: as of ``save``.

    Returns:
      A ``Pending``. An error of the background is raised by its ``wait()``; if nobody
      calls that, it is printed to stderr when the ``Pending`` is let go.

    Raises:
      CheckpointError: the state is not one that can be saved.
      DonatedBufferError: a state that a donating step has consumed.

    Laws: ``save_async(root, s).wait()`` writes the bytes of ``save(root, s)``, whatever
    happens to ``s`` in between.

    Differs from DeepSpeed and torch DCP: nothing is configured or reused; a failure is
    an exception of the save that failed, and names it.

    Example:
      >>> import tempfile, torch
      >>> from zfunc.core.mesh import make_mesh
      >>> from zfunc.core.state import shard
      >>> state = shard({"w": torch.ones(2)}, make_mesh({"data": 1}))
      >>> with tempfile.TemporaryDirectory() as root:
      ...     pending = save_async(root, state)
      ...     _ = state.params["w"].buffer.zero_()  # as a donating step may do
      ...     pending.wait().name
      'step-00000000'
    """
    mesh = mesh_of(state, "save_async: state")
    check_usable(state)
    check_keep(keep, "save_async")
    wait_for_running()
    folder = Path(root)
    draft = attempted(lambda: on_host(drafted(state, mesh, cursor, meta)))
    peers = Peers(mesh, own_group(mesh))
    result: Future[Path] = Future()
    work = functools.partial(write_checkpoint, folder, peers, draft, keep)
    what = f"saving in {folder}"
    SavingThread(target=_resolve, args=(result, work), name=what, daemon=False).start()
    return Pending(what, result)


def _resolve(result: Future[Path], work: Callable[[], Path]) -> None:
    try:
        made = work()
    except BaseException as error:
        result.set_exception(error)
    else:
        result.set_result(made)


def _tell_if_unheard(what: str, result: Future[Path], asked: threading.Event) -> None:
    """Print an error that nobody can ask for any more."""

    def tell(done: Future[Path]) -> None:
        error = done.exception()
        if error is not None and not asked.is_set():
            kind = "" if isinstance(error, CheckpointError) else type(error).__name__
            text = f"{kind}: {error}" if kind else str(error)
            print(f"{what} failed, and wait() was not called: {text}", file=sys.stderr)

    result.add_done_callback(tell)
