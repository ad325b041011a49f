# SPDX-License-Identifier: Apache-2.0
"""A first beta or a momentum that varies, against torch.optim with it set by hand."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import zfunc as zf
from zfunc.core.tree import tree_flatten, tree_leaves, tree_structure, tree_unflatten
from zfunc.optim import (
    adam,
    adamw,
    apply_updates,
    constant,
    one_cycle,
    scale_by_adam,
    sgd,
    trace,
)

STEPS = 12
CYCLE = one_cycle(
    0.01,
    0.1,
    cycle_first_step_size=4,
    cycle_second_step_size=3,
    decay_lr_rate=0.5,
    decay_mom_rate=0.01,
    decay_step_size=2,
)


def start(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randn(3, generator=generator, dtype=torch.float64).to(dtype),
        "s": torch.randn((), generator=generator, dtype=torch.float64).to(dtype),
        "w": torch.randn(5, 3, generator=generator, dtype=torch.float64).to(dtype),
    }


def gradient(p, step):
    generator = torch.Generator().manual_seed(100 + step)
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return 0.5 * p + noise.to(p.dtype)


def ours(tx, dtype=torch.float64):
    params = start(dtype)
    moments, path = tx.init(params), []
    for step in range(STEPS):
        grads = {k: gradient(p, step) for k, p in params.items()}
        updates, moments = tx.update(grads, moments, params)
        params = apply_updates(params, updates)
        path += tree_leaves(params)
    return path


def torchs(make, write, **options):
    params = [p.requires_grad_() for p in start().values()]
    optimizer, path = make(params, lr=1.0, **options), []
    for step in range(STEPS):
        for p in params:
            p.grad = gradient(p.detach(), step)
        group = optimizer.param_groups[0]
        group["lr"] = float(CYCLE.learning_rate(step))
        write(group, float(CYCLE.momentum(step)))
        optimizer.step()
        path += [p.detach().clone() for p in params]
    return path


def assert_same(path, expected):
    for a, b in zip(path, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("make", "make_torch"), [(adam, torch.optim.Adam), (adamw, torch.optim.AdamW)]
)
def test_adam_with_one_cycle_is_torchs(make, make_torch):
    def write(group, momentum):
        group["betas"] = (momentum, 0.99)

    tx = make(CYCLE.learning_rate, b1=CYCLE.momentum, b2=0.99, weight_decay=0.1)
    expected = torchs(make_torch, write, weight_decay=0.1)
    assert_same(ours(tx), expected)
    # The correction matters: with the momentum of step 0 throughout it is another path.
    other = ours(make(CYCLE.learning_rate, b1=0.8, b2=0.99, weight_decay=0.1))
    assert float((other[-1] - expected[-1]).abs().max()) > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_one_cycle_is_torchs(nesterov):
    def write(group, momentum):
        group["momentum"] = momentum

    tx = sgd(CYCLE.learning_rate, momentum=CYCLE.momentum, nesterov=nesterov)
    options = {"momentum": 0.5, "nesterov": nesterov}
    assert_same(ours(tx), torchs(torch.optim.SGD, write, **options))


def test_dampening_goes_with_a_schedule():
    tx = sgd(CYCLE.learning_rate, momentum=CYCLE.momentum, dampening=0.3)

    def write(group, momentum):
        group["momentum"] = momentum

    assert_same(ours(tx), torchs(torch.optim.SGD, write, momentum=0.5, dampening=0.3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_constant_schedule_is_the_constant(dtype):
    for number, schedule in (
        (adamw(0.1, b1=0.7), adamw(0.1, b1=constant(0.7))),
        (adamw(0.1, b1=0.7), adamw(0.1, b1=lambda step: 0.7)),
        (sgd(0.1, 0.7, nesterov=True), sgd(0.1, constant(0.7), nesterov=True)),
    ):
        params = start(dtype)
        assert tree_structure(number.init(params)) == tree_structure(
            schedule.init(params)
        )
        for a, b in zip(ours(number, dtype), ours(schedule, dtype), strict=True):
            assert a.dtype == b.dtype == dtype
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "tx", [scale_by_adam(b1=CYCLE.momentum), trace(CYCLE.momentum, nesterov=True)]
)
def test_moments_keep_structure_and_dtypes_also_of_scalars(tx, dtype):
    params = start(dtype)
    moments = tx.init(params)
    updates, after = tx.update(params, moments, params)
    assert tree_structure(after) == tree_structure(moments)
    for a, b in zip(tree_leaves(after), tree_leaves(moments), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
    wide = torch.promote_types(dtype, torch.float32)
    assert {u.dtype for u in tree_leaves(updates)} == {wide}


@pytest.mark.parametrize(
    "tx",
    [scale_by_adam(b1=CYCLE.momentum), trace(CYCLE.momentum, nesterov=True)],
)
def test_a_traced_update_has_no_step_baked_in(tx):
    params = start()
    grads = {k: gradient(p, 0) for k, p in params.items()}
    moments = tx.init(params)
    leaves, spec = tree_flatten((grads, moments, params))

    def flat(*xs):
        return tree_flatten(tx.update(*tree_unflatten(spec, xs)))[0]

    program = make_fx(flat)(*leaves)
    for _ in range(STEPS):
        expected = tree_flatten(tx.update(grads, moments, params))[0]
        got = program(*tree_flatten((grads, moments, params))[0])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        _, moments = tx.update(grads, moments, params)


def test_a_compiled_step_has_the_same_bits():
    def loss(params, x):
        return (torch.tanh(x @ params["w"]) + params["b"]).square().mean()

    tx = adamw(CYCLE.learning_rate, b1=CYCLE.momentum, b2=0.99)
    step = zf.train_step(loss, tx)
    mesh = zf.make_mesh({})
    eager = zf.shard(start(torch.float32), mesh)
    jitted, compiled = zf.jit(step), zf.shard(start(torch.float32), mesh)
    for seed in range(STEPS):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        eager, compiled = step(eager, x), jitted(compiled, x)
    for a, b in zip(tree_leaves(eager), tree_leaves(compiled), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("answer", [None, "0.1", True, torch.ones(1)])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda f: scale_by_adam(b1=f), "the schedule of scale_by_adam: b1 returned"),
        (lambda f: sgd(0.1, momentum=f), "the schedule of trace: momentum returned"),
    ],
)
def test_a_schedule_returns_a_number(make, what, answer):
    tx, p = make(lambda step: answer), torch.ones(1)
    with pytest.raises(TypeError, match=what):
        tx.update(p, tx.init(p), p)
