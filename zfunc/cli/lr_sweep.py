# SPDX-License-Identifier: Apache-2.0
"""A range test of the learning rate on the model and the data of ``zfunc train``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import zfunc as zf
from zfunc.cli.config import TrainConfig
from zfunc.cli.corpus import open_corpus
from zfunc.cli.errors import Problem, UsageError
from zfunc.cli.lr_curve import Curve, Point, has_diverged, smoothed
from zfunc.cli.program import first_state, sharded_step
from zfunc.cli.verify import on_device
from zfunc.data import Cursor, Loader
from zfunc.launch import Job
from zfunc.optim import (
    GradientTransformation,
    Schedule,
    adamw,
    chain,
    clip_by_global_norm,
    decay_matrices,
    identity,
    join,
    lr_range_test,
)

MIN_STEPS = 10


class Sweep(NamedTuple):
    """Through which rates, and when to stop.

    Attributes:
      min_lr: The rate of the first step.
      max_lr: The rate of the last one.
      linear: Rise by equal amounts; else by equal factors, nearly.
      smoothing: Of the loss, in [0, 1).
      diverged_by: The sweep ends when the smoothed loss is this many times its lowest.
    """

    min_lr: float = 1e-5
    max_lr: float = 10.0
    linear: bool = False
    smoothing: float = 0.8
    diverged_by: float = 1.5

    def problems(self, steps: int) -> Iterator[Problem]:
        """All that is wrong with it, in a sweep of so many steps.

        Examples:
          >>> [str(p) for p in Sweep(min_lr=0.1, max_lr=0.01).problems(100)]
          ['--min-lr 0.1: must be less than --max-lr 0.01']
        """
        if steps < MIN_STEPS:
            yield Problem(f"--steps {steps}", f"must be at least {MIN_STEPS}")
        finite = {"--min-lr": self.min_lr, "--max-lr": self.max_lr}
        wrong = [n for n, lr in finite.items() if not 0 < lr < math.inf]
        for name in wrong:
            yield Problem(f"{name} {finite[name]:g}", "must be a number above 0")
        if not wrong and self.min_lr >= self.max_lr:
            what = f"--min-lr {self.min_lr:g}"
            yield Problem(what, f"must be less than --max-lr {self.max_lr:g}")
        if not 0 <= self.smoothing < 1:
            what = f"--smoothing {self.smoothing:g}"
            yield Problem(what, "must be at least 0 and less than 1")
        if not 1 < self.diverged_by < math.inf:
            yield Problem(f"--diverged-by {self.diverged_by:g}", "must be more than 1")

    def schedule(self, steps: int) -> Callable[[torch.Tensor | int], torch.Tensor]:
        """Range tests as DeepSpeed has them, from the least rate to the largest.

        One, if it is linear; else one after the other, each over (nearly) as many
        steps, that double the rate, or a little less so that they end at the largest.

        Examples:
          >>> rate = Sweep(0.1, 0.5, linear=True).schedule(5)
          >>> [round(float(rate(step)), 3) for step in range(5)]
          [0.1, 0.2, 0.3, 0.4, 0.5]
          >>> rate = Sweep(0.1, 0.4).schedule(5)
          >>> [round(float(rate(step)), 3) for step in range(5)]
          [0.1, 0.15, 0.2, 0.3, 0.4]
        """
        rises, ratio = steps - 1, self.max_lr / self.min_lr
        if self.linear:
            return lr_range_test(self.min_lr, rises, ratio - 1)
        parts = min(rises, math.ceil(math.log2(ratio)))
        factor = ratio ** (1 / parts)
        starts = [k * rises // parts for k in range(parts + 1)]
        tests = [
            lr_range_test(self.min_lr * factor**k, after - before, factor - 1)
            for k, (before, after) in enumerate(pairwise(starts))
        ]
        return join(tests, starts[1:-1])


def optimizer(config: TrainConfig, schedule: Schedule) -> GradientTransformation:
    """The optimizer of ``zfunc train`` with another schedule; its moments are the same.

    Args:
      config: Of the run.
      schedule: Of the learning rate.
    """
    clip = clip_by_global_norm(config.clip) if config.clip else identity()
    decay = config.weight_decay
    return chain(
        clip, adamw(schedule, b2=0.95, weight_decay=decay, mask=decay_matrices)
    )


def measure(
    config: TrainConfig,
    sweep: Sweep,
    job: Job,
    tell: Callable[[Point], None] = lambda point: None,
) -> Curve:
    """Train while the rate rises, until the loss diverges; nothing is written.

    Every rank sees the same losses, so all of them stop at the same step.

    Args:
      config: The model, its data, and the number of steps.
      sweep: Through which rates.
      job: This rank's place.
      tell: Told of every step that did not diverge, in order.

    Returns:
      The same curve on every rank.

    Raises:
      UsageError: The text cannot be used, or there was no finite loss at all.
    """
    corpus = open_corpus(config.data)
    mesh = zf.make_mesh({"data": job.world})
    try:
        loader = Loader(
            corpus.train,
            seq_len=config.seq_len,
            global_batch=config.batch_size,
            rank=int(mesh.rank),
            world=mesh.size,
        )
        curve = _swept(config, sweep, mesh, loader, tell)
        # The first rank to leave has torchrun stop the others.
        float(zf.psum(torch.zeros((), device=mesh.device), "data", mesh))
        return curve
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _swept(
    config: TrainConfig,
    sweep: Sweep,
    mesh: zf.Mesh,
    loader: Loader,
    tell: Callable[[Point], None],
) -> Curve:
    schedule, beta = sweep.schedule(config.steps), sweep.smoothing
    step_fn = _compiled(config, optimizer(config, schedule))
    state, cursor = first_state(config, mesh), Cursor(seed=config.seed)
    losses: list[float] = []
    points: list[Point] = []
    for step in range(1, config.steps + 1):
        batch, cursor = loader.next(cursor)
        state = step_fn(state, on_device(batch, mesh))
        loss, skipped = _read(state.metrics)
        if skipped and math.isfinite(loss):
            continue  # float16 looks for its loss scale: no update, and no new rate
        rate, mean = float(schedule(len(points))), smoothed([*losses, loss], beta)
        if has_diverged(points, loss, mean, sweep.diverged_by):
            if not points:
                raise UsageError(
                    f"the loss of the first step is {loss}, before any update: the "
                    "model cannot be trained with these options"
                )
            return Curve(tuple(points), (step, rate))
        losses.append(loss)
        points.append(Point(step, rate, loss, mean))
        tell(points[-1])
    if not points:
        raise UsageError(
            f"the gradients of all {config.steps} steps overflowed: give more --steps, "
            "in which the loss scale can fall, or --precision bf16"
        )
    return Curve(tuple(points), None)


def _read(metrics: zf.Metrics) -> tuple[float, bool]:
    """The loss, and whether the update was left out; waits for the device once."""
    numbers = torch.stack([metrics.loss.double(), metrics.skipped.double()])
    loss, skipped = numbers.tolist()
    return loss, bool(skipped)


def _compiled(
    config: TrainConfig, tx: GradientTransformation
) -> Callable[[zf.TrainState, Any], zf.TrainState]:
    """The step of ``zfunc train`` with another optimizer, as its backend runs it."""
    step = sharded_step(config)._replace(tx=tx)
    if config.backend == "eager":
        return zf.donate(step)
    return zf.jit(step, backend=config.backend)
