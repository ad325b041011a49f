# SPDX-License-Identifier: Apache-2.0
"""L15 on real gloo ranks: the programs, with the messages that they really send."""

import pytest
import torch

import zfunc as zf
from tests.distributed import test_ranks as eager
from zfunc.program.passes import DEFAULT

pytestmark = pytest.mark.distributed


def train(axes, zero, microbatches, kind, clip, policy, jitted):
    """Leaves of the full state after three steps, on this rank."""
    mesh = zf.make_mesh(axes)
    world, rank = mesh.axis_size("data"), int(mesh.axis_index("data"))
    transforms = [zf.partition(zero=zero), zf.accumulate(microbatches)]
    if policy is not None:
        transforms.append(zf.precision(policy))
    tx = eager.optimizer(kind, clip)
    step = zf.train_step(eager.loss_fn, tx, *transforms)
    if jitted is not None:
        step = zf.jit(step, **jitted)
    spec = zf.P() if zero == 0 else None
    state = zf.shard(eager.params_of(), mesh, tx=tx, spec=spec)
    size = eager.SAMPLES // world
    for i in range(3):
        batch = zf.tree_map(
            lambda x: x[rank * size : (rank + 1) * size], eager.batch_of(i)
        )
        state = step(state, batch)
    return zf.tree_leaves(zf.unshard(state))


def assert_same(pool, axes, *recipe, **jitted):
    want = pool.run(train, axes, *recipe, None)
    got = pool.run(train, axes, *recipe, jitted)
    for rank, (mine, expected) in enumerate(zip(got, want, strict=True)):
        assert len(mine) == len(expected)
        for a, b in zip(mine, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), f"rank {rank}"


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("microbatches", "kind", "clip", "policy"),
    [(1, "sgd", True, None), (2, "adamw", False, "bf16"), (3, "adamw", True, None)],
)
def test_jitted_is_eager_on_two_ranks(ranks, zero, microbatches, kind, clip, policy):
    recipe = (zero, microbatches, kind, clip, policy)
    assert_same(ranks(2), {"data": 2}, *recipe)


@pytest.mark.parametrize("zero", [0, 3])
def test_every_pass_alone_on_two_ranks(ranks, zero):
    recipe = (zero, 2, "adamw", True, None)
    for some in [(), *[(i,) for i in range(len(DEFAULT))]]:
        assert_same(ranks(2), {"data": 2}, *recipe, passes=Chosen(some))


class Chosen(tuple):
    """Some of the default passes, by their places: closures do not travel."""

    __slots__ = ()

    def __iter__(self):
        return (DEFAULT[i] for i in tuple.__iter__(self))

    def __reduce__(self):
        return Chosen, (list(tuple.__iter__(self)),)


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("zero", [1, 3])
def test_jitted_is_eager_on_more_ranks(ranks, world, zero):
    recipe = (zero, 2, "adamw", True, None)
    axes = {"data": 3} if world == 3 else {"data": 2, "tensor": 2}
    assert_same(ranks(world), axes, *recipe)


def test_without_donation_too(ranks):
    recipe = (3, 1, "adamw", True, None)
    assert_same(ranks(2), {"data": 2}, *recipe, donate=False)
