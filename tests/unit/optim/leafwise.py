# SPDX-License-Identifier: Apache-2.0
"""What the tests of elementwise optimizers share: trajectories, and what all owe."""

import torch

import zfunc as zf
from tests.laws.cases import assert_bitwise
from tests.unit.optim import test_transformations as owed
from zfunc.core.tree import tree_leaves, tree_map
from zfunc.optim import apply_updates
from zfunc.testing import simulate, split_batch

STEPS = 40
SHAPES = {"b": (3,), "s": (), "w": (5, 3)}


def randn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def start():
    return {k: randn(*s, seed=i) for i, (k, s) in enumerate(SHAPES.items())}


def gradient(p, step):
    """Depends on the parameters, so that a wrong step makes the next ones wrong too."""
    return 0.5 * p + randn(*p.shape, seed=100 + step)


def trajectory(tx, steps=STEPS):
    """The parameters after each step, and the last moments."""
    params = start()
    moments, path = tx.init(params), []
    for step in range(steps):
        grads = {k: gradient(p, step) for k, p in params.items()}
        updates, moments = tx.update(grads, moments, params)
        params = apply_updates(params, updates)
        path.append(params)
    return path, moments


def torch_trajectory(make, steps=STEPS, **options):
    """The same of a ``torch.optim.Optimizer``."""
    params = {k: p.requires_grad_() for k, p in start().items()}
    optimizer, path = make(params.values(), **options), []
    for step in range(steps):
        for p in params.values():
            p.grad = gradient(p.detach(), step)
        optimizer.step()
        path.append({k: p.detach().clone() for k, p in params.items()})
    return path


def assert_same(path, expected, rtol=1e-9, atol=1e-12):
    assert len(path) == len(expected)
    for got, want in zip(path, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# --- what every transformation owes -----------------------------------------------


def zero_gradients_move_nothing(tx):
    """Also where a step has been taken, and without eps: never NaN."""
    params = {**start(), "empty": torch.zeros(0, 3, dtype=torch.float64)}
    zeros = tree_map(torch.zeros_like, params)
    got, moments = params, tx.init(params)
    for _ in range(3):
        updates, moments = tx.update(zeros, moments, got)
        got = apply_updates(got, updates)
    assert_bitwise(got, params, "zero gradients")
    assert all(x.isfinite().all() for x in tree_leaves(moments))


def jitted_is_eager(tx, dtype=torch.float32):
    """On the aten backend, with and without donation, also of the moments' bits."""

    def loss(params, batch):
        wide = tree_map(lambda p: p.float(), params)
        return sum(((p - batch) ** 2).sum() for p in tree_leaves(wide))

    step = zf.train_step(loss, tx)
    for donated in (False, True):
        params = tree_map(lambda x: x.to(dtype), owed.tree(0))
        want = got = zf.shard(params, zf.make_mesh({}), tx=tx)
        got = tree_map(torch.clone, want)
        jitted = zf.jit(step, donate=donated)
        for batch in torch.randn(3, 4, generator=torch.Generator().manual_seed(0)):
            want, got = step(want, batch[0]), jitted(got, batch[0])
            assert_bitwise(got, want, f"donated={donated}")


def donated_is_eager(tx, dtype=torch.float32):
    """A step that updates a few leaves at a time makes the same bits."""

    def loss(params, batch):
        return sum(((p.float() - batch) ** 2).sum() for p in tree_leaves(params))

    step = zf.train_step(loss, tx)
    params = [owed.tree(seed, dtype) for seed in range(4)]
    want = got = zf.shard(params, zf.make_mesh({}), tx=tx)
    got = tree_map(torch.clone, want)
    for batch in (torch.tensor(0.3), torch.tensor(-1.7)):
        want, got = step(want, batch), zf.donate(step)(got, batch)
    assert_bitwise(got, want, "donated")


def moments_share_no_memory(tx):
    """A step may write over what it consumes: each buffer is used once."""
    params = owed.tree(0, torch.float32)
    buffers = [x.data_ptr() for x in tree_leaves((params, tx.init(params)))]
    assert len(set(buffers)) == len(buffers)


def ranks_agree(tx, zero=2):
    """Three ranks train like one, on sizes that do not divide, in float64."""

    def loss(params, batch):
        return zf.Mean((batch @ params["w"].T).square().sum(), torch.tensor(6.0))

    step = zf.train_step(loss, tx, zf.partition(zero=zero))
    sim = simulate(step, {"data": 3})
    params, batch = {"w": randn(5, 3, seed=0)}, randn(6, 3, seed=1)
    pieces, whole = sim.shard(params, tx=tx), zf.shard(params, zf.make_mesh({}), tx=tx)
    plain = zf.train_step(lambda p, b: loss(p, b).total / 18, tx)
    for _ in range(3):
        pieces = sim(pieces, split_batch(batch, {"data": 3}))
        whole = plain(whole, batch)
    got, want = sim.unshard(pieces), zf.unshard(whole)
    for name in ("params", "moments"):
        wrong = zf.testing.differences(
            getattr(got, name), getattr(want, name), rtol=1e-9, atol=1e-12
        )
        assert not wrong, wrong


def all_ranks(tx):
    owed.test_all_ranks_together_make_the_unsharded_update(tx, 4)


OWED = (
    donated_is_eager,
    jitted_is_eager,
    moments_share_no_memory,
    ranks_agree,
    all_ranks,
    owed.test_update_leaves_its_inputs_alone,
    owed.test_no_transformation_looks_at_values,
    owed.test_a_traced_update_has_no_step_baked_in,
    owed.test_update_under_vmap_is_update_of_each,
    owed.test_moments_keep_structure_and_dtypes,
    owed.test_placed_updates_are_those_of_plain_trees,
)


def assert_zeros_stay_zeros(tx, dtype):
    """Zero and empty gradients give zero updates, in float32, with float32 moments."""
    params = {
        "none": torch.ones(0, 3, dtype=dtype),
        "nothing": torch.ones(2, 0, dtype=dtype),
        "s": torch.ones((), dtype=dtype),
        "w": torch.ones(3, 2, dtype=dtype),
    }
    updates, moments = tx.update(
        tree_map(torch.zeros_like, params), tx.init(params), params
    )
    for u in tree_leaves(updates):
        assert u.dtype == torch.float32
        assert not u.any()
    updates, moments = tx.update(params, moments, params)
    assert all(u.isfinite().all() for u in tree_leaves(updates))
    floats = [m for m in tree_leaves(moments) if m.is_floating_point()]
    assert {m.dtype for m in floats} == {torch.float32}


def assert_computed_in_float32(tx, params):
    """Parameters and gradients in bfloat16 give what the same values in float32 do."""
    wide = {k: p.to(torch.bfloat16).float() for k, p in params.items()}
    narrow = tree_map(torch.Tensor.bfloat16, wide)
    results = [tree_leaves(tx.update(p, tx.init(p), p)) for p in (wide, narrow)]
    torch.testing.assert_close(*results, rtol=0, atol=0)
