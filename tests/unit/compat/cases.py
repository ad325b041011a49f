# SPDX-License-Identifier: Apache-2.0
"""Engines around small modules, and the same training with torch alone."""

import torch
import torch.distributed as dist
from torch import nn

import zfunc as zf
from zfunc.compat import bridge
from zfunc.compat.setting import Setting

LR = 1e-2


class Net(nn.Module):
    """A tied weight, a frozen one, a buffer, a dropout: what a bridge may lose."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.drop = nn.Dropout(0.2)
        self.twice = nn.Linear(7, 7)
        self.again = self.twice
        self.last = nn.Linear(7, 3)
        self.last.bias.requires_grad_(False)
        self.register_buffer("shift", torch.full((5,), 0.25))

    def forward(self, x):
        x = torch.tanh(self.first(x + self.shift.to(x.dtype)))
        return self.last(torch.tanh(self.again(self.twice(self.drop(x)))))


class WithLoss(Net):
    """The same, returning its loss as models of transformers do."""

    def forward(self, x, y):
        logits = super().forward(x)
        return {"loss": nn.functional.cross_entropy(logits, y), "logits": logits}


def made(kind=Net):
    torch.manual_seed(0)
    return kind()


def batch(i, rank=0, samples=6):
    generator = torch.Generator().manual_seed(100 * i + rank)
    x = torch.randn(samples, 5, generator=generator)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def engine_of(
    module, *, zero=0, accumulation=1, clip=None, transforms=(), compute=None
):
    """An engine without a configuration, on every rank of the job."""
    mesh = zf.make_mesh({"data": dist.get_world_size() if dist.is_initialized() else 1})
    parts = [] if clip is None else [zf.optim.clip_by_global_norm(clip)]
    tx = zf.optim.chain(*parts, zf.optim.adamw(LR, weight_decay=0.01))
    setting = Setting(
        tx,
        (zf.partition(zero=zero), *transforms),
        zero,
        accumulation,
        6,
        lambda count: LR,
        spec=zf.P() if zero == 0 else None,
        storage=torch.float32,
        compute=compute,
    )
    return bridge.engine_of(module, setting, mesh)


def torch_run(kind, steps, accumulation=1, world=1, clip=None, loss_of=None):
    """Losses of rank 0 and the module after ``steps`` updates; autograd and AdamW."""
    module = made(kind)
    loss_of = loss_of or default_loss
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.01)
    losses = []
    for i in range(steps * accumulation):
        for rank in range(world):
            torch.manual_seed(1000 * i + rank)
            loss = loss_of(module, *batch(i, rank), rank)
            if rank == 0:
                losses.append(loss.item())
            (loss / accumulation / world).backward()
        if (i + 1) % accumulation == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses, module


def engine_run(engine, steps, loss_of=None):
    """The same with an engine, on this rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    loss_of = loss_of or default_loss
    losses = []
    for i in range(steps * engine.gradient_accumulation_steps()):
        torch.manual_seed(1000 * i + rank)
        loss = loss_of(engine, *batch(i, rank), rank)
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    return losses


def default_loss(module, x, y, rank):
    if isinstance(getattr(module, "module", module), WithLoss):
        return module(x, y)["loss"]
    return nn.functional.cross_entropy(module(x), y)
