# SPDX-License-Identifier: Apache-2.0
"""float16 on real ranks with overflows on one of them: all skip the same steps."""

import hashlib

import pytest
import torch

import zfunc as zf
from zfunc.models import gpt

pytestmark = pytest.mark.distributed

CONFIG = gpt.GPTConfig(
    vocab_size=256,
    d_model=16,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    d_ff=32,
    max_seq_len=16,
)
STEPS = 12
OVERFLOWS = {2: 1, 5: 0, 6: 1}  # the rank whose loss overflows, by step


def loss_fn(params, batch):
    mean = gpt.loss(params, {"tokens": batch["tokens"]}, config=CONFIG)
    return zf.Mean(mean.total * batch["factor"].mean(), mean.weight)


def digest(state):
    """A hash of what an update changes, with the key."""
    leaves = zf.tree_leaves((state.params, state.moments, state.key))
    parts = (x.contiguous().view(-1).view(torch.uint8) for x in leaves)
    return hashlib.sha256(b"".join(bytes(x.tolist()) for x in parts)).hexdigest()


def train(zero, jitted):
    """For each step: skipped or not, whether the hash stayed, and the scale."""
    mesh = zf.make_mesh({"data": 2})
    rank = int(mesh.axis_index("data"))
    tx = zf.optim.chain(
        zf.optim.clip_by_global_norm(1.0),
        zf.optim.adamw(zf.optim.warmup_linear(1e-2, 2, STEPS)),
    )
    rule = zf.DynamicLossScale(initial_scale_power=5, hysteresis=1)
    step = zf.train_step(
        loss_fn, tx, zf.partition(zero=zero), zf.precision("fp16", loss_scale=rule)
    )
    step = zf.jit(step) if jitted else step
    spec = zf.P() if zero == 0 else None
    state = zf.shard(gpt.init(CONFIG, seed=0), mesh, tx=tx, spec=spec)
    rows = []
    for i in range(STEPS):
        generator = torch.Generator().manual_seed(2 * i + rank)
        tokens = torch.randint(0, 256, (2, 9), generator=generator)
        factor = torch.full((2,), 1.0)
        if OVERFLOWS.get(i) == rank:
            factor = torch.full((2,), torch.inf)
        before = digest(state)
        state = step(state, {"tokens": tokens, "factor": factor})
        kept = digest(state) == before
        rows.append((int(state.metrics.skipped), kept, float(state.loss_scale.scale)))
    return rows, int(state.loss_scale.skipped_steps), int(state.step)


@pytest.mark.parametrize(("zero", "jitted"), [(0, True), (1, False), (3, True)])
def test_all_ranks_skip_the_same_steps(ranks, zero, jitted):
    (rows, skipped, steps), other = ranks(2).run(train, zero, jitted)
    assert other == (rows, skipped, steps)
    assert [i for i, row in enumerate(rows) if row[0]] == sorted(OVERFLOWS)
    assert [i for i, row in enumerate(rows) if row[1]] == sorted(OVERFLOWS)
    assert (skipped, steps) == (3, STEPS)
    assert rows[-1][2] == 2.0**5 / 2**3
