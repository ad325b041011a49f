# SPDX-License-Identifier: Apache-2.0
"""``with_frozen`` on real ranks: frozen pieces travel to their uses, never back."""

from collections import Counter

import pytest
import torch

import zfunc as zf
from tests.unit.core.common import randn, traffic
from tests.unit.transforms.test_frozen import TREE, blocks, halves, loss_fn

pytestmark = pytest.mark.distributed


def messages_of(step, state, batch):
    return Counter(kind for kind, *_ in traffic(step, state, batch))


def train(zero, remat, jit):
    mesh = zf.make_mesh({"data": 2})
    trained, frozen = halves()
    step, on_every_rank = (
        zf.train_step(
            zf.with_frozen(blocks if remat else loss_fn, where),
            zf.optim.sgd(0.1),
            zf.partition(zero=zero),
        )
        for where in (zf.shard(frozen, mesh).params, frozen)
    )
    state = zf.shard(trained, mesh, spec=zf.P() if zero == 0 else None)
    rank = int(mesh.axis_index("data"))
    batches = [randn(4, 6, seed=seed)[2 * rank :][:2] for seed in range(2)]
    run = zf.jit(step) if jit else step
    sent = [messages_of(fn, state, batches[0]) for fn in (step, on_every_rank)]
    for batch in batches:
        state = run(state, batch)
    return zf.unshard(state).params, sent[0] - sent[1], sent[1] - sent[0]


def expected():
    """One rank, whole batch, everything differentiated."""
    step = zf.train_step(loss_fn, zf.optim.sgd(0.1))
    state = zf.shard(TREE, zf.make_mesh({}))
    whole = state.params["a"]["w"]
    for seed in range(2):
        state = step(state, randn(4, 6, seed=seed))
        params = {**state.params, "a": {**state.params["a"], "w": whole}}
        state = state.replace(params=params)
    return zf.unshard(state).params


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_two_ranks_are_one(ranks, zero, remat):
    want = expected()
    for jit in (False, True):
        for params, more, fewer in ranks(2).run(train, zero, remat, jit):
            for got, leaf in [
                (params["a"]["b"], want["a"]["b"]),
                (params["head"]["w"], want["head"]["w"]),
            ]:
                torch.testing.assert_close(got, leaf, rtol=1e-12, atol=1e-12)
            assert "w" not in params["a"]
            # One gather at the use of the frozen matrix, another in the backward of
            # remat (with those of its block at stage 3), and nothing on the way back.
            gathers = 0 if zero == 3 and remat else 1 + remat
            assert (more.total(), more["all_gather_into_tensor"]) == (gathers, gathers)
            assert not fewer
