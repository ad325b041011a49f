# SPDX-License-Identifier: Apache-2.0
"""Reductions in rank order beside those of gloo: the shortest of some runs.

Run: torchrun --nproc-per-node 2 docs/adr/0006_timings.py
"""

import os
import time

import torch
import torch.distributed as dist

import zfunc as zf

ELEMENTS_PER_RANK, RUNS = 1_000_000, 20

# CPU also where there is a GPU: the comparison is with gloo.
mesh = zf.make_mesh({"data": int(os.environ["WORLD_SIZE"])}, device="cpu")
x = torch.randn(mesh.size * ELEMENTS_PER_RANK)
piece, whole = torch.empty(ELEMENTS_PER_RANK), x.clone()
# torch 2.13 has a new name for it and warns at the old one.
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def milliseconds(fn):
    fn()
    best_s = float("inf")
    for _ in range(RUNS):
        dist.barrier()
        start_s = time.perf_counter()
        fn()
        best_s = min(best_s, time.perf_counter() - start_s)
    return f"{1e3 * best_s:.1f} ms"


rows = [
    ("reduce-scatter", "gloo", lambda: reduce_scatter(piece, x)),
    ("reduce-scatter", "zfunc", lambda: zf.psum_scatter(x, "data", mesh)),
    ("all-reduce", "gloo", lambda: dist.all_reduce(whole)),
    ("all-reduce", "zfunc", lambda: zf.psum(x, "data", mesh)),
]
for operation, whose, fn in rows:
    took = milliseconds(fn)
    if mesh.rank == 0:
        print(f"{operation} of {x.nbytes / 1e6:.0f} MB, {whose}: {took}")
dist.destroy_process_group()
