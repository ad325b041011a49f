# SPDX-License-Identifier: Apache-2.0
"""The inductor backend on real gloo ranks."""

import pytest
import torch

import zfunc as zf
from tests.distributed import test_ranks as eager

pytestmark = pytest.mark.distributed


def train(zero, microbatches, backend):
    """Losses of ten steps on this rank."""
    mesh = zf.make_mesh({"data": 2})
    rank = int(mesh.axis_index("data"))
    tx = eager.optimizer("adamw", clip=True)
    transforms = [zf.partition(zero=zero), zf.accumulate(microbatches)]
    step = zf.jit(zf.train_step(eager.loss_fn, tx, *transforms), backend=backend)
    state, size = zf.shard(eager.params_of(), mesh, tx=tx), eager.SAMPLES // 2
    losses = []
    for i in range(10):
        batch = zf.tree_map(
            lambda x: x[rank * size : (rank + 1) * size], eager.batch_of(i)
        )
        state = step(state, batch)
        losses.append(state.metrics.loss)
    return torch.stack(losses)


@pytest.mark.parametrize(("zero", "microbatches"), [(1, 1), (3, 2)])
def test_compiled_losses_are_those_of_aten_on_two_ranks(ranks, zero, microbatches):
    want = ranks(2).run(train, zero, microbatches, "aten")
    got = ranks(2).run(train, zero, microbatches, "inductor")
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=0)
