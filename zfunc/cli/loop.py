# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, one row each, checkpoints, and an end that ranks agree on."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

import zfunc as zf
from zfunc import checkpoint
from zfunc.cli.config import TrainConfig
from zfunc.cli.errors import UsageError
from zfunc.cli.metrics import Row
from zfunc.cli.program import schedule_of, sharded_step
from zfunc.cli.verify import on_device
from zfunc.data import Cursor, Loader


class Progress(NamedTuple):
    """Where a training is: all that a checkpoint holds."""

    state: zf.TrainState
    cursor: Cursor

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.state.step)


class Observer(Protocol):
    """What is told about a training: rank 0 writes it down, the others do not."""

    def row(self, row: Row) -> None:
        """A step was measured."""
        ...

    def saving(self, step: int) -> None:
        """A checkpoint is about to be written; all rows up to it were given."""
        ...


class Silent:
    """The observer of the ranks that say nothing."""

    def row(self, row: Row) -> None:
        """Nothing."""

    def saving(self, step: int) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Training:
    """What the loop needs besides where it is."""

    config: TrainConfig
    mesh: zf.Mesh
    loader: Loader
    checkpoints: Path
    meta: dict[str, object]
    elapsed_s: float


class _Pending(NamedTuple):
    """A step whose numbers have not been read: reading them waits for the device."""

    step: int
    numbers: torch.Tensor
    ranks: torch.Tensor


class _Read(NamedTuple):
    step: int
    loss: float
    grad_norm: float
    signal: int
    peak_rss_mb: float


def train(
    training: Training,
    start: Progress,
    observer: Observer,
    stop_signal: Callable[[], int],
) -> tuple[Progress, int]:
    """Take the remaining steps, or those until a rank is told to stop.

    A step's numbers are read when the next one is under way, so the host never waits
    for the device; whether to stop travels with them, so all ranks stop at one step.

    Args:
      training: The run.
      start: Where to begin; its buffers are used up.
      observer: Told of every step, in order.
      stop_signal: The signal that told this rank to stop, 0 if none did.

    Returns:
      Where the training is, saved as a checkpoint, and the signal that stopped it, 0
      if it is complete.

    Raises:
      UsageError: The loss is not a number.
    """
    config, mesh = training.config, training.mesh
    step_fn = zf.donate(sharded_step(config))
    clock = _Clock(training, observer, start.step)
    here, pending, saved, signal = start, None, start.step, 0
    del start
    for step in range(here.step + 1, config.steps + 1):
        batch, cursor = training.loader.next(here.cursor)
        state = step_fn(here.state, on_device(batch, mesh))
        here = Progress(state, cursor)
        before, pending = pending, _measured(step, state, mesh, stop_signal())
        if before is not None:
            signal = clock.tell(before)
        if step % config.save_every == 0 or step == config.steps or signal:
            stop_here, pending = clock.tell(pending), None
            signal = signal or stop_here
            _save(training, here, observer)
            saved = step
        if signal:
            break
    return here, signal if saved < config.steps else 0


class _Clock:
    """Turns measurements into rows."""

    def __init__(self, training: Training, observer: Observer, step: int) -> None:
        self._training, self._observer = training, observer
        self._schedule = schedule_of(training.config)
        self._start_s = time.perf_counter() - training.elapsed_s
        self._times = [time.perf_counter()]

    def tell(self, pending: _Pending) -> int:
        """Read a step, tell the observer; the signal to stop on, if any."""
        read = _read(pending)
        config, now = self._training.config, time.perf_counter()
        if not abs(read.loss) < float("inf"):
            raise UsageError(
                f"the loss is {read.loss} at step {read.step}: the training has "
                f"diverged. Start again with a lower --lr (it was {config.lr}) or more "
                "--warmup-steps."
            )
        tokens = config.batch_size * config.seq_len
        took_s, self._times[0] = now - self._times[0], now
        self._observer.row(
            Row(
                step=read.step,
                loss=read.loss,
                grad_norm=read.grad_norm,
                lr=float(self._schedule(read.step - 1)),
                tokens=tokens * read.step,
                tokens_per_s=round(tokens / took_s, 1),
                elapsed_s=round(now - self._start_s, 3),
                peak_rss_mb=round(read.peak_rss_mb, 1),
            )
        )
        return read.signal


def _measured(
    step: int, state: zf.TrainState, mesh: zf.Mesh, signal: int
) -> _Pending:
    """Start to gather a step's numbers; nothing is waited for."""
    metrics = state.metrics
    numbers = torch.stack([metrics.loss.double(), metrics.grad_norm.double()])
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mine = torch.tensor([[float(signal), float(peak_bytes)]], dtype=torch.float64)
    return _Pending(step, numbers, zf.all_gather(mine.to(mesh.device), "data", mesh))


def _read(pending: _Pending) -> _Read:
    loss, grad_norm = pending.numbers.tolist()
    signal, peak_bytes = pending.ranks.amax(dim=0).tolist()
    return _Read(pending.step, loss, grad_norm, int(signal), peak_bytes / 1e6)


def _save(training: Training, here: Progress, observer: Observer) -> None:
    observer.saving(here.step)
    checkpoint.save(
        training.checkpoints, here.state, cursor=here.cursor, meta=training.meta
    )
