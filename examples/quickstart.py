# SPDX-License-Identifier: Apache-2.0
"""Train a small network under ZeRO-3, on one process or on several.

    python examples/quickstart.py
    torchrun --nproc-per-node 2 examples/quickstart.py

Both print the same losses: how many ranks there are is no part of the result.
"""

import os

import torch
import torch.distributed as dist

import zfunc as zf

SAMPLES, STEPS = 64, 60  # the batch is global: more ranks, fewer samples each


def loss_fn(params, batch):
    """Any function of a tree of tensors: no wrapped module, no hook, no annotation."""
    hidden = torch.tanh(batch["x"] @ params["up"] + params["bias"])
    return (hidden @ params["down"] - batch["y"]).square().mean()


def global_batch(step):
    """Random inputs, and a function of them to learn."""
    x = torch.randn(SAMPLES, 16, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x.roll(1, dims=1).sin()}


# torchrun says how many ranks there are; a plain `python` is a job of one.
mesh = zf.make_mesh({"data": int(os.environ.get("WORLD_SIZE", "1"))})
rank, ranks = int(mesh.axis_index("data")), mesh.axis_size("data")

# Every rank makes the same parameters, and `shard` keeps this rank's piece of them.
torch.manual_seed(0)
params = {
    "up": torch.randn(16, 128) / 4,
    "bias": torch.zeros(128),
    "down": torch.randn(128, 16) / 12,
}
tx = zf.optim.chain(zf.optim.clip_by_global_norm(1.0), zf.optim.adamw(3e-3))
train_step = zf.train_step(loss_fn, tx, zf.partition(zero=3), zf.accumulate(4))
state = zf.shard(params, mesh)

for step in range(1, STEPS + 1):
    # A rank is given its own samples of the batch, as anywhere in torch.
    mine = slice(rank * SAMPLES // ranks, (rank + 1) * SAMPLES // ranks)
    batch = {k: x[mine].to(mesh.device) for k, x in global_batch(step).items()}
    state = train_step(state, batch)
    # The loss is already the mean over all ranks; reading it waits for the device.
    if rank == 0 and (step == 1 or step % 20 == 0):
        print(f"step {step:2}  loss {float(state.metrics.loss):.5f}")

if rank == 0:
    held = sum(x.numel() for x in zf.tree_leaves(state.params))
    whole = sum(x.numel() for x in zf.tree_leaves(params))
    print(f"rank 0 of {ranks} holds {held} of {whole} parameters")

# An interpreter that ends with gloo's threads still running may abort.
if dist.is_initialized():
    dist.destroy_process_group()
