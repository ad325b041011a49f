# SPDX-License-Identifier: Apache-2.0
"""The training loop: steps, a row for each, checkpoints, an end the ranks agree on."""

from __future__ import annotations

import math
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import zfunc as zf
from zfunc import checkpoint
from zfunc.checkpoint import Pending
from zfunc.cli.config import TrainConfig
from zfunc.cli.errors import UsageError
from zfunc.cli.hashes import hashed_leaves, hashes_of, named
from zfunc.cli.metrics import Row
from zfunc.cli.observer import Observer
from zfunc.cli.program import compiled_step, schedule_of
from zfunc.cli.verify import on_device
from zfunc.data import Cursor, Loader

# Of the dynamic scale in float16; an overflow there does not go away.
SMALLEST_SCALE = zf.DynamicLossScale().min_loss_scale


class Progress(NamedTuple):
    """Where a training is: all that a checkpoint holds."""

    state: zf.TrainState
    cursor: Cursor

    @property
    def step(self) -> int:
        """Steps that are done."""
        return int(self.state.step)


@dataclass(frozen=True)
class Training:
    """What the loop needs besides where it is."""

    config: TrainConfig
    mesh: zf.Mesh
    loader: Loader
    checkpoints: Path
    meta: dict[str, Any]


class _Measured(NamedTuple):
    """A step whose numbers have not been read: reading them waits for the device."""

    step: int
    time_s: float
    numbers: torch.Tensor
    ranks: torch.Tensor
    paths: tuple[str, ...] = ()
    hashes: torch.Tensor | None = None


def train(
    training: Training,
    start: Progress,
    observer: Observer,
    stop_signal: Callable[[], int],
) -> tuple[Progress, int]:
    """Take the remaining steps, or those until a rank is told to stop.

    A step's numbers are read when the next one is under way, so the host never waits
    for the device; whether to stop travels with them, so all ranks stop at one step.
    Checkpoints are written beside the steps that follow; the last one is waited for.

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
      CheckpointError: A checkpoint could not be written.
    """
    config, mesh = training.config, training.mesh
    step_fn = compiled_step(config)
    clock = _Clock(training, observer)
    here, saved, signal = start, start.step, 0
    pending: _Measured | None = None
    del start
    with _waited_for() as saving:
        for step in range(here.step + 1, config.steps + 1):
            batch, cursor = training.loader.next(here.cursor)
            state = step_fn(here.state, on_device(batch, mesh))
            here = Progress(state, cursor)
            before, pending = pending, _measured(step, state, mesh, stop_signal())
            if before is not None:
                signal = clock.tell(before)
            saves = step % config.save_every == 0 or step == config.steps or signal
            if saves or step % config.hash_every == 0:
                pending = _hashed(pending, state, mesh)
            if saves:
                stop_here, pending = clock.tell(pending), None
                signal = signal or stop_here
                _save(training, here, observer, saving)
                clock.go_on()
                saved = step
            if signal:
                break
    return here, signal if saved < config.steps else 0


@contextmanager
def _waited_for() -> Iterator[deque[Pending]]:
    """Room for the save that is under way; at the end it is done, however that comes.

    Raises:
      CheckpointError: It could not be written.
    """
    saving: deque[Pending] = deque(maxlen=1)
    try:
        yield saving
    finally:
        for pending in saving:
            pending.wait()


class _Clock:
    """Turns measurements into rows."""

    def __init__(self, training: Training, observer: Observer) -> None:
        self._training, self._observer = training, observer
        self._schedule = schedule_of(training.config)
        self._stuck = deque([False], maxlen=1)  # at the last step
        now = time.perf_counter()
        self._start_s, self._times = now - observer.elapsed_s, deque([now], maxlen=1)

    def tell(self, pending: _Measured) -> int:
        """Read a step, tell the observer; the signal to stop on, if any."""
        loss, grad_norm, skipped, skipped_before, scale = pending.numbers.tolist()
        signal, peak_bytes = pending.ranks.amax(dim=0).tolist()
        config = self._training.config
        is_stuck = bool(skipped) and scale <= SMALLEST_SCALE
        was_stuck, self._stuck[0] = self._stuck[0], is_stuck
        overflowed = skipped and not (is_stuck and was_stuck)
        if not (math.isfinite(loss) and (overflowed or math.isfinite(grad_norm))):
            raise UsageError(
                f"the loss is {loss} and the gradient's norm {grad_norm} at step "
                f"{pending.step}: the training diverged. "
                f"Start again with a lower --lr (it was {config.lr}) or more "
                "--warmup-steps."
            )
        tokens = config.batch_size * config.seq_len
        row = Row(
            step=pending.step,
            loss=loss,
            grad_norm=grad_norm,
            lr=float(self._schedule(pending.step - 1 - int(skipped_before))),
            tokens=tokens * pending.step,
            tokens_per_s=round(tokens / (pending.time_s - self._times[-1]), 1),
            elapsed_s=round(pending.time_s - self._start_s, 3),
            peak_rss_mb=round(peak_bytes / 1e6, 1),
            skipped=int(skipped),
        )
        self._times.append(pending.time_s)
        if pending.hashes is not None:
            hashes = named(pending.paths, pending.hashes)
            self._observer.hashes(pending.step, hashes)
        self._observer.row(row)
        return int(signal)

    def go_on(self) -> None:
        """The next step starts now: the time since the last one is not its own."""
        self._times.append(time.perf_counter())


def _measured(step: int, state: zf.TrainState, mesh: zf.Mesh, signal: int) -> _Measured:
    """Start to gather a step's numbers; nothing is waited for."""
    metrics = state.metrics
    skipped, scale = torch.zeros_like(metrics.skipped), torch.ones_like(metrics.loss)
    if state.loss_scale is not None:
        skipped = state.loss_scale.skipped_steps - metrics.skipped
        scale = state.loss_scale.scale
    measured = (metrics.loss, metrics.grad_norm, metrics.skipped, skipped, scale)
    numbers = torch.stack([x.double() for x in measured])
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    mine = torch.tensor([[float(signal), float(peak_bytes)]], dtype=torch.float64)
    ranks = zf.all_gather(mine.to(mesh.device), "data", mesh)
    return _Measured(step, time.perf_counter(), numbers, ranks)


def _hashed(measured: _Measured, state: zf.TrainState, mesh: zf.Mesh) -> _Measured:
    paths = tuple(path for path, _ in hashed_leaves(state))
    return measured._replace(paths=paths, hashes=hashes_of(state, mesh))


def _save(
    training: Training, here: Progress, observer: Observer, saving: deque[Pending]
) -> None:
    """Wait for the save before, and begin this one."""
    for pending in saving:
        pending.wait()
    observer.saving()
    saving.append(
        checkpoint.save_async(
            training.checkpoints,
            here.state,
            cursor=here.cursor,
            meta=training.meta,
            keep=training.config.keep,
        )
    )
