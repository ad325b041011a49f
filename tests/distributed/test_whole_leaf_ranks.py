# SPDX-License-Identifier: Apache-2.0
"""LAMB, Muon and Adafactor on real gloo ranks, and their checkpoints."""

import pytest
import torch
import torch.distributed as dist

import zfunc as zf
from tests.distributed import test_ranks as eager
from tests.laws.test_l1_whole_leaf_optimizers import MAKERS
from tests.unit.checkpoint.states import contents
from zfunc.checkpoint import restore, save

pytestmark = pytest.mark.distributed
STEPS = 3


def started(kind, mesh, zero):
    spec = zf.P() if zero == 0 or not mesh.axes else None
    return zf.shard(eager.params_of(), mesh, tx=MAKERS[kind](), spec=spec)


def train(kind, state, mesh, zero, first, last, jitted=False):
    """The state after the batches of some steps, of which this rank has its part."""
    transforms = (zf.partition(zero=zero),) if mesh.axes else ()
    step = zf.train_step(eager.loss_fn, MAKERS[kind](), *transforms)
    step = zf.jit(step) if jitted else step
    size = eager.SAMPLES // mesh.size
    mine = slice(int(mesh.rank) * size, (int(mesh.rank) + 1) * size)
    for i in range(first, last):
        state = step(state, zf.tree_map(lambda x: x[mine], eager.batch_of(i)))
    return state


def scene(kind, zero, jitted):
    mesh = zf.make_mesh({"data": dist.get_world_size()})
    state = train(kind, started(kind, mesh, zero), mesh, zero, 0, STEPS, jitted)
    return zf.tree_leaves(zf.unshard(state))


@pytest.mark.parametrize("kind", MAKERS)
def test_two_ranks_are_one(ranks, kind):
    mesh = zf.make_mesh({})
    alone = train(kind, started(kind, mesh, 0), mesh, 0, 0, STEPS)
    want = zf.tree_leaves(zf.unshard(alone))
    for zero in range(4):
        for got in ranks(2).run(scene, kind, zero, False):
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["lamb", "muon", "adafactor_momentum"])
def test_jitted_is_eager_on_two_ranks(ranks, kind):
    for zero in (0, 3):
        want = ranks(2).run(scene, kind, zero, False)
        got = ranks(2).run(scene, kind, zero, True)
        for one, other in zip(want, got, strict=True):
            assert all(map(torch.equal, one, other))


def scene_save(folder, kind):
    """A checkpoint after two steps, and where training goes from there."""
    mesh = zf.make_mesh({"data": dist.get_world_size()})
    state = train(kind, started(kind, mesh, 3), mesh, 3, 0, 2)
    save(folder / kind, state)
    return contents(zf.unshard(state)), zf.tree_leaves(
        zf.unshard(train(kind, state, mesh, 3, 2, 4))
    )


@pytest.mark.parametrize("kind", ["lamb", "muon", "adafactor_momentum"])
def test_a_checkpoint_of_two_ranks_goes_on_on_one(ranks, tmp_path, kind):
    saved, further = ranks(2).run(scene_save, tmp_path, kind)[0]
    mesh = zf.make_mesh({"data": 1})
    state = restore(tmp_path / kind, started(kind, mesh, 3)).state
    assert contents(zf.unshard(state)) == saved
    resumed = zf.tree_leaves(zf.unshard(train(kind, state, mesh, 3, 2, 4)))
    for a, b in zip(resumed, further, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
