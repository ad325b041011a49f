# SPDX-License-Identifier: Apache-2.0
"""The same training under the four ZeRO stages: equal losses, other bytes.

    python examples/four_stages.py
    torchrun --nproc-per-node 2 examples/four_stages.py

One rank has nothing to share, so its four lines are alike: start two.
"""

import os

import torch
import torch.distributed as dist

import zfunc as zf
from zfunc.testing.memory import peak_live_bytes

LAYERS, WIDTH, SAMPLES, STEPS = 8, 128, 32, 5

mesh = zf.make_mesh({"data": int(os.environ.get("WORLD_SIZE", "1"))})
rank, ranks = int(mesh.axis_index("data")), mesh.axis_size("data")


def block(layer, x):
    return x + torch.tanh(x @ layer["up"]) @ layer["down"]


def loss_fn(params, x):
    # remat gathers a block's weights, frees them, and gathers them again in the
    # backward. Without it stage 3 holds all of them until the backward has used them.
    for layer in params:
        x = zf.remat(block)(layer, x)
    return x.square().mean()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, WIDTH, generator=generator)
    return x.chunk(ranks)[rank].to(mesh.device)


def train(zero):
    """Losses, bytes of the state between steps, peak bytes during a step."""
    torch.manual_seed(0)
    params = [
        {
            "up": torch.randn(WIDTH, 4 * WIDTH) / WIDTH**0.5,
            "down": torch.randn(4 * WIDTH, WIDTH) / (4 * WIDTH),
        }
        for _ in range(LAYERS)
    ]
    tx = zf.optim.adamw(1e-3)
    # A donated step uses up the state it is given, so that there is never a second.
    step = zf.donate(zf.train_step(loss_fn, tx, zf.partition(zero=zero)))
    # Stage 0 keeps the state whole on every rank. The others share one layout.
    spec = zf.P() if zero == 0 else zf.P("data")
    state = zf.shard(params, mesh, tx=tx, spec=spec)
    del params
    losses = []
    for i in range(STEPS - 1):
        state = step(state, batch(i))
        losses.append(float(state.metrics.loss))
    kept = sum(x.nbytes for x in zf.tree_leaves(state))
    last, peak = peak_live_bytes(step, state, batch(STEPS - 1))
    return [*losses, float(last.metrics.loss)], kept, peak


expected, apart = None, 0.0
for zero in (0, 1, 2, 3):
    losses, kept, peak = train(zero)
    expected = expected or losses
    apart = max(apart, *(abs(a - b) for a, b in zip(losses, expected, strict=True)))
    if rank == 0:
        print(
            f"zero {zero}, {ranks} ranks: loss {losses[-1]:.6f}, per rank: "
            f"state {kept / 1e6:.1f} MB, peak of a step {peak / 1e6:.1f} MB"
        )
# On CPU the stages add up in the same order, so the difference is 0 and not small.
# (NCCL chooses an order of its own for each collective.)
if rank == 0:
    print(f"largest difference between the stages' losses: {apart}")

# An interpreter that ends with gloo's threads still running may abort.
if dist.is_initialized():
    dist.destroy_process_group()
