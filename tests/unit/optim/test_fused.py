# SPDX-License-Identifier: Apache-2.0
"""The fused step of an optimizer is its chain, bit for bit, wherever a step runs.

Triton's interpreter runs the kernels here.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from zfunc.core.tree import tree_structure
from zfunc.core.update import consuming_update, pure_update
from zfunc.kernels.adamw import adamw as kernel
from zfunc.optim import (
    adam,
    adamw,
    chain,
    clip_by_global_norm,
    clip_by_value,
    decay_matrices,
    identity,
    lamb,
    lion,
    sgd,
    warmup_linear,
)
from zfunc.program.backends import aten
from zfunc.program.inplace import write_over
from zfunc.program.pure import lowered
from zfunc.testing import simulate, split_batch


def _ramp(step):
    return 0.8 + 0.01 * step


OPTIMIZERS = {
    "adamw": lambda k: adamw(1e-2, kernels=k),
    "adamw-mask": lambda k: adamw(0.1, mask=decay_matrices, kernels=k),
    "adamw-eps0": lambda k: adamw(0.1, eps=0.0, weight_decay=0.0, kernels=k),
    "adamw-schedules": lambda k: adamw(warmup_linear(0.1, 2, 9), _ramp, kernels=k),
    "adam": lambda k: adam(0.1, 0.8, 0.9, kernels=k),
    "adam-decay": lambda k: adam(0.1, weight_decay=0.1, kernels=k),
    "lion": lambda k: lion(0.1, weight_decay=0.1, mask=decay_matrices, kernels=k),
    "sgd": lambda k: sgd(0.1, weight_decay=0.1, kernels=k),
    "momentum": lambda k: sgd(0.1, 0.9, dampening=0.5, kernels=k),
    "nesterov": lambda k: sgd(0.1, _ramp, True, 0.1, kernels=k),
    "clip, lion": lambda k: chain(clip_by_global_norm(0.5), lion(0.1, kernels=k)),
    "clip": lambda k: chain(clip_by_global_norm(0.5), adamw(0.1, kernels=k)),
    "value, clip": lambda k: chain(
        clip_by_value(1.0), clip_by_global_norm(0.5), adamw(0.1, kernels=k)
    ),
    "clip, value": lambda k: chain(
        clip_by_global_norm(0.5), clip_by_value(0.2), adam(0.1, kernels=k)
    ),
    "nested": lambda k: chain(
        clip_by_global_norm(0.5), chain(identity(), adamw(0.1, kernels=k))
    ),
    "then": lambda k: chain(adamw(0.1, kernels=k), clip_by_value(0.05)),
}


def tree(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b": (3,), "empty": (0, 2), "one": (), "w": (17, 61)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def equal(a, b):
    assert tree_structure(a) == tree_structure(b)
    for x, y in zip(zf.tree_leaves(a), zf.tree_leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("finite", [None, True, False])
@pytest.mark.parametrize("update", ["pure", "consuming"])
def test_the_bits_of_the_chain(name, finite, update):
    make = OPTIMIZERS[name]
    finite = None if finite is None else torch.tensor(finite)
    results = []
    for kernels in ("reference", "triton"):
        tx, params = make(kernels), tree(0)
        moments = tx.init(params)
        for seed in (1, 2, 3):
            if update == "pure":
                params, moments = pure_update(tx, tree(seed), moments, params, finite)
            else:
                owned = [params, moments]
                params, moments = consuming_update(tx, tree(seed), owned, finite)
        results.append((params, moments))
    equal(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes(dtype):
    results = []
    for kernels in ("reference", "triton"):
        tx, params = OPTIMIZERS["clip"](kernels), tree(0, dtype)
        results.append(pure_update(tx, tree(1, dtype), tx.init(params), params))
    equal(*results)


def _loss(p, x):
    return (torch.tanh(x @ p["w"].T).sum() + p["b"].sum() * p["one"]) / 4


@given(st.integers(1, 8), st.sampled_from([1, 2, 3]))
@settings(max_examples=5)
def test_steps_on_a_mesh(seed, zero):
    params, batch = tree(seed), torch.randn(4, 61)
    states = []
    for kernels in ("reference", "triton"):
        tx = OPTIMIZERS["clip"](kernels)
        sim = simulate(zf.train_step(_loss, tx, zf.partition(zero=zero)), {"data": 2})
        states.append(sim(sim.shard(params), split_batch(batch, {"data": 2})))
    equal(*states)


@pytest.mark.parametrize("donate", [False, True])
def test_a_program_has_it_as_one_call(donate):
    """Written over the old state where that is donated."""
    mesh = zf.make_mesh({"data": 1})

    def loss(p, x):
        return (x @ p["w"].T).square().mean() + p["b"].sum() * p["one"]

    states = []
    for kernels in ("reference", "triton"):
        tx = OPTIMIZERS["clip"](kernels)
        step = zf.train_step(loss, tx, zf.partition(zero=3))
        jitted = zf.jit(step, donate=donate)
        state = zf.shard(tree(0), mesh)
        for seed in (1, 2):
            batch = torch.randn(4, 61, generator=torch.Generator().manual_seed(seed))
            state = jitted(state, batch)
        states.append(state)
    equal(*states)
    text = jitted.lower(state, batch).as_text()
    assert text.count("zfunc.adamw") == 1
    assert ("zfunc.adamw_" in text) is donate


@pytest.mark.parametrize("mode", ["eager", "donate", "jit"])
@pytest.mark.parametrize("name", ["adamw-mask", "adam-decay", "clip"])
def test_large_trees_on_a_cpu(name, mode):
    """One pass in C++ has the bits of the chain, whoever runs the step."""
    states, large = [], {"w": torch.randn(1100, 1000) / 32, "b": torch.randn(7)}
    batch = torch.randn(2, 1000)
    for kernels in ("reference", "auto"):
        tx = OPTIMIZERS[name](kernels)
        assert tx.fused.applies(large) is (kernels == "auto")
        step = zf.train_step(
            lambda p, x: (x @ p["w"].T).square().mean() + p["b"].sum(), tx
        )
        run = {"eager": step, "donate": zf.donate(step), "jit": zf.jit(step)}[mode]
        state = zf.shard(large, zf.make_mesh({"data": 1}))
        for _ in range(2):
            state = run(state, batch)
        states.append(state)
    equal(*states)


LAMBS = {
    "lamb": {"weight_decay": 0.1, "mask": decay_matrices},
    "uncorrected": {"bias_correction": False, "max_coeff": 2.0, "min_coeff": 0.5},
    "eps0": {"eps": 0.0},
}


@pytest.mark.parametrize("name", LAMBS)
@pytest.mark.parametrize("finite", [None, True, False])
def test_lamb_up_to_roundings_of_the_norms(name, finite):
    finite = None if finite is None else torch.tensor(finite)
    results = []
    for kernels in ("reference", "triton"):
        tx = chain(clip_by_global_norm(0.5), lamb(0.1, **LAMBS[name], kernels=kernels))
        params = tree(0, torch.float64)
        moments = tx.init(params)
        for seed in (1, 2):
            grads = tree(seed, torch.float64)
            params, moments = pure_update(tx, grads, moments, params, finite)
        owned = [params, moments]
        again = pure_update(tx, tree(3, torch.float64), moments, params, finite)
        equal(again, consuming_update(tx, tree(3, torch.float64), owned, finite))
        results.append(again)
    assert tree_structure(results[0]) == tree_structure(results[1])
    for x, y in zip(*map(zf.tree_leaves, results), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("zero", [1, 3])
def test_lamb_on_a_mesh(zero):
    batch = torch.randn(4, 61, dtype=torch.float64)
    states = []
    for kernels in ("reference", "triton"):
        step = zf.train_step(_loss, lamb(0.1, kernels=kernels), zf.partition(zero=zero))
        sim = simulate(step, {"data": 2})
        state = sim.shard(tree(0, torch.float64))
        states.append(sim(state, split_batch(batch, {"data": 2})))
    for x, y in zip(*map(zf.tree_leaves, states), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("reads", ["nothing", "param", "view", "moment"])
def test_what_is_read_afterwards_is_not_written_over(reads):
    def run(grad, state):
        p, m, n = state
        done = kernel([p], [grad], [m], [n], **options)
        late = {"param": p, "view": p[1:].sin(), "moment": n, "nothing": grad}[reads]
        return done.params[0], done.mu[0], done.nu[0] + late.sum()

    options = {"learning_rate": 0.1, "weight1": 0.1, "weight2": 0.1, "kernel": "triton"}
    grad, state = torch.randn(9), tuple(torch.rand(9) for _ in "pmn")
    program = write_over(lowered(run, grad, state))
    assert ("zfunc.adamw_" in program.as_text()) is (reads == "nothing")
    expected = run(grad, state)
    equal(tuple(program.run_by(aten.compile_graph)([grad, *state])), expected)


def test_messages():
    with pytest.raises(ValueError, match="adamw: kernels is 'fused', expected 'auto'"):
        adamw(0.1, kernels="fused")
    with pytest.raises(ValueError, match="adam: kernels is 'cuda', expected 'auto'"):
        adam(0.1, kernels="cuda")
