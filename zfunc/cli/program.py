# SPDX-License-Identifier: Apache-2.0
"""A run as zfunc's public API has it: optimizer, step, first state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

import zfunc as zf
from zfunc.cli.config import TrainConfig
from zfunc.models import gpt
from zfunc.optim import (
    GradientTransformation,
    adamw,
    chain,
    clip_by_global_norm,
    decay_matrices,
    identity,
    warmup_cosine,
)

FINAL_LR_FRACTION = 0.1


def schedule_of(config: TrainConfig) -> Callable[[torch.Tensor | int], torch.Tensor]:
    """The learning rate by step: it rises, then falls to a tenth of its peak."""
    end = FINAL_LR_FRACTION * config.lr
    return warmup_cosine(config.lr, config.warmup, config.steps, end=end)


def optimizer(config: TrainConfig) -> GradientTransformation:
    """AdamW with clipping, as small language models are usually trained."""
    clip = clip_by_global_norm(config.clip) if config.clip else identity()
    decay = config.weight_decay
    return chain(
        clip,
        adamw(schedule_of(config), b2=0.95, weight_decay=decay, mask=decay_matrices),
    )


def loss_of(config: TrainConfig) -> Callable[..., zf.Mean]:
    """The loss of the model, each block recomputed in the backward if asked."""
    remat = zf.remat if config.remat else None
    return functools.partial(gpt.loss, config=config.model, remat=remat)


def sharded_step(config: TrainConfig) -> zf.TrainStep:
    """The step of the run: ZeRO, precision and accumulation around the loss."""
    return zf.train_step(
        loss_of(config),
        optimizer(config),
        zf.partition(zero=config.zero),
        zf.precision(config.precision),
        zf.accumulate(config.microbatches),
    )


def compiled_step(
    config: TrainConfig,
) -> Callable[[zf.TrainState, Any], zf.TrainState]:
    """The step as the run's backend runs it; it consumes the state it is given."""
    step = sharded_step(config)
    if config.backend == "eager":
        return zf.donate(step)
    return zf.jit(step, backend=config.backend)


def first_state(config: TrainConfig, mesh: zf.Mesh) -> zf.TrainState:
    """The state before the first step, on a mesh; ``{}`` is unsharded."""
    sharded = mesh.axes and config.zero > 0
    return zf.shard(
        gpt.init(config.model, seed=config.seed),
        mesh,
        tx=optimizer(config),
        spec=zf.P("data") if sharded else zf.P(),
        key=config.seed,
    )


def full_params(state: zf.TrainState) -> Any:
    """The parameters in full, on every rank; the rest of the state stays sharded."""
    return zf.unshard(state.replace(grads=None, moments=None)).params
