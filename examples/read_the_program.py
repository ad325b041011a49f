# SPDX-License-Identifier: Apache-2.0
"""What the passes do to a ZeRO-3 step, read off the program for four ranks.

    python examples/read_the_program.py

Nothing is trained and no rank is started: the step is traced on shapes alone.
"""

import torch

import zfunc as zf
from zfunc.models import gpt
from zfunc.models.gpt_config import GPTConfig
from zfunc.program import passes

CONFIG = GPTConfig(
    vocab_size=512, d_model=192, n_layers=12, n_heads=4, d_ff=768, max_seq_len=64
)
MESH = zf.AbstractMesh({"data": 4})


def loss_fn(params, batch):
    return gpt.loss(params, batch, config=CONFIG)


tx = zf.optim.adamw(1e-3)
step = zf.train_step(loss_fn, tx, zf.partition(zero=3))
params, batch = zf.abstract(
    (gpt.init(CONFIG), {"tokens": torch.zeros(4, 65, dtype=torch.int64)})
)
with torch._guards.detect_fake_mode(zf.tree_leaves(params)):
    state = zf.shard(params, MESH, tx=tx)
psi_bytes = sum(x.nbytes for x in zf.tree_leaves(params))

program = zf.jit(step, passes=()).lower(state, batch)
print(f"{len(zf.tree_leaves(params))} parameters, {psi_bytes / 1e6:.1f} MB")
print("pass                nodes  messages  sent MB  peak MB  gathered MB at the peak")
names = ["(as traced)", *(p.__name__ for p in passes.DEFAULT)]
for name, change in zip(names, [None, *passes.DEFAULT], strict=True):
    program = change(program) if change else program
    comm, memory = program.comm_analysis(), program.memory_analysis()
    messages = sum(row.count for row in comm.rows)
    gathered = memory.peak.bytes.gathered
    print(
        f"{name:<18} {len(program.graph.nodes):>6} {messages:>9} "
        f"{comm.total_bytes / 1e6:>8.1f} {memory.peak_bytes / 1e6:>8.1f} "
        f"{gathered / 1e6:>8.1f}"
    )
