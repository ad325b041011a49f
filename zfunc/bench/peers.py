# SPDX-License-Identifier: Apache-2.0
"""What zfunc is compared with: the usual training loop, and torch's two engines."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from zfunc.bench.setup import Setup, Step


def eager(setup: Setup) -> Step:
    """The training loop of every tutorial, with the fused optimizer."""
    model = setup.model()
    return _loop(model, setup.optimizer(model))


def compiled(setup: Setup) -> Step:
    """The same with ``torch.compile(model)``."""
    model = setup.model()
    return _loop(torch.compile(model), setup.optimizer(model))


def ddp(setup: Setup) -> Step:
    """``DistributedDataParallel`` with the fused optimizer."""
    model = setup.model()
    return _loop(DistributedDataParallel(model), setup.optimizer(model))


def fsdp2(setup: Setup) -> Step:
    """``fully_shard`` of each decoder layer and of the root."""
    model = setup.model()
    mesh = init_device_mesh(setup.device.type, (setup.world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _loop(model, setup.optimizer(model))


def _loop(model: Any, optimizer: torch.optim.Optimizer) -> Step:
    def step(ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
