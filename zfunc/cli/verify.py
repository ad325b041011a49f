# SPDX-License-Identifier: Apache-2.0
"""The first steps of a run once more, sharded and unsharded, side by side."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

import zfunc as zf
from zfunc.cli.config import TrainConfig
from zfunc.cli.program import first_state, loss_of, optimizer, sharded_step
from zfunc.data import Cursor, Loader


class Differences(NamedTuple):
    """The largest difference between the sharded and the unsharded run.

    Attributes:
      steps: How many first steps were compared; those that overflowed were not.
      loss: In nats per byte.
      gradients: Of an element, relative to the largest one of its tensor.
    """

    steps: int
    loss: float
    gradients: float


def compare(config: TrainConfig, mesh: zf.Mesh, loader: Loader) -> Differences:
    """Repeat the first steps from the same parameters, sharded as in the run and not.

    The unsharded run is one process with the whole global batch, in float32, without
    any transformation; rank 0 computes it. Every rank calls this.

    Args:
      config: Of the run; ``verify_steps`` of its steps are compared.
      mesh: Of the run.
      loader: Of the run's training data, as seen from this rank.

    Returns:
      The differences on rank 0; zeros on the others.
    """
    steps, compared = min(config.verify_steps, config.steps), 0
    if not steps:
        return Differences(0, 0.0, 0.0)
    sharded, step = first_state(config, mesh), sharded_step(config)
    cursor = Cursor(seed=config.seed)
    reference = _reference(config) if loader.rank == 0 else None
    whole = dataclasses.replace(loader, rank=0, world=1)
    loss, gradients = 0.0, 0.0
    for _ in range(steps):
        batch, after = loader.next(cursor)
        sharded = step(sharded, on_device(batch, mesh))
        cursor_before, cursor = cursor, after
        if int(sharded.metrics.skipped):  # it overflowed, and changed nothing
            continue
        compared += 1
        grads = zf.unshard(sharded.replace(params=None, moments=None)).grads
        if reference is not None:
            plain, state = reference
            state = plain(state, on_device(whole.next(cursor_before)[0], mesh))
            reference = plain, state
            difference = float(sharded.metrics.loss) - float(state.metrics.loss)
            loss = max(loss, abs(difference))
            expected = zf.unshard(state.replace(params=None, moments=None)).grads
            gradients = max(gradients, _relative(grads, expected))
    return Differences(compared, loss, gradients)


def _reference(config: TrainConfig) -> tuple[zf.TrainStep, zf.TrainState]:
    step = zf.train_step(loss_of(config), optimizer(config))
    return step, first_state(config, zf.make_mesh({}))


def _relative(got: object, expected: object) -> float:
    """Largest error of an element, relative to the largest element of its tensor."""

    def one(a: torch.Tensor, b: torch.Tensor) -> float:
        largest = float(b.abs().max())
        return float((a - b).abs().max()) / largest if largest else float(a.abs().max())

    return float(max(zf.tree_leaves(zf.tree_map(one, got, expected))))


def on_device(batch: dict[str, torch.Tensor], mesh: zf.Mesh) -> dict[str, torch.Tensor]:
    """A batch where the mesh computes."""
    return {name: x.to(mesh.device) for name, x in batch.items()}
