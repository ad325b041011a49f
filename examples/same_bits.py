# SPDX-License-Identifier: Apache-2.0
"""Ten steps on 1, 2 and 4 ranks: the same parameters, bit for bit.

    python examples/same_bits.py

Starts the ranks itself, and prints the sha256 of the parameters with deterministic=True
and with plain data parallelism, and what a step takes.
"""

import hashlib
import os
import subprocess
import sys
import time

import torch
import torch.distributed as dist

import zfunc as zf

WIDTH, LAYERS, SAMPLES, STEPS = 64, 3, 32, 10


def loss_fn(params, batch):
    x = batch
    for layer in params:
        x = x + torch.tanh(x @ layer["w"] + layer["b"])
    return zf.Mean((x - 1).square().sum(), torch.tensor(float(x.numel())))


def train(mesh, deterministic):
    """The hash of the parameters after all steps, and the seconds of a step."""
    rank, ranks = int(mesh.axis_index("data")), mesh.axis_size("data")
    torch.manual_seed(0)
    params = [
        {"w": torch.randn(WIDTH, WIDTH) / 8, "b": torch.zeros(WIDTH)}
        for _ in range(LAYERS)
    ]
    tx = zf.optim.chain(
        zf.optim.clip_by_global_norm(0.5, deterministic=deterministic),
        zf.optim.adamw(1e-3),
    )
    pieces = zf.partition(zero=1, deterministic=deterministic)
    step = zf.jit(zf.train_step(loss_fn, tx, pieces))
    state = zf.shard(params, mesh, tx=tx)
    times = []
    for i in range(STEPS):
        batch = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(i))
        start = time.perf_counter()
        state = step(state, batch.chunk(ranks)[rank])
        times.append(time.perf_counter() - start)
    full = zf.tree_leaves(zf.unshard(state).params)
    digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in full)).hexdigest()
    return digest, sorted(times)[STEPS // 2]


def one_rank():
    """What a rank of one of the three jobs does."""
    torch.set_num_threads(1)  # products of matrices depend on the number of threads
    mesh = zf.make_mesh({"data": int(os.environ.get("WORLD_SIZE", "1"))})
    for deterministic in (True, False):
        digest, seconds = train(mesh, deterministic)
        if int(mesh.axis_index("data")) == 0:
            name = "deterministic" if deterministic else "plain"
            ranks = mesh.axis_size("data")
            print(f"{name:13} {ranks} rank(s) {digest} {1e3 * seconds:6.2f} ms a step")
    if dist.is_initialized():
        dist.destroy_process_group()


if "SAME_BITS_RANK" in sys.argv:
    one_rank()
else:
    for ranks in (1, 2, 4):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        job = [f"--nproc-per-node={ranks}", __file__, "SAME_BITS_RANK"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*launcher, *job], check=True, env=environment)
