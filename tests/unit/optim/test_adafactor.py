# SPDX-License-Identifier: Apache-2.0
"""Adafactor: ``torch.optim.Adafactor`` and the paper, and leaves of odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.optim.leafwise import assert_computed_in_float32
from zfunc.core.tree import tree_structure
from zfunc.optim import adafactor, apply_updates, decay_matrices, scale_by_adafactor
from zfunc.testing import random_tree

STEPS = 5
SHAPES = {
    "matrix": torch.Size([5, 3]),
    "row": torch.Size([1, 4]),
    "scalar": torch.Size([]),
    "stack": torch.Size([2, 3, 4]),
    "vector": torch.Size([7]),
}


def gradients(params, step, scale=1.0):
    """They depend on the parameters, so that a wrong step makes the next ones wrong."""
    noise = random_tree(SHAPES, 100 + step)
    return {k: scale * (0.5 * p + noise[k]) for k, p in params.items()}


def ours(tx, size=1.0, scale=1.0):
    params = {k: size * p for k, p in random_tree(SHAPES, 0).items()}
    moments, path = tx.init(params), []
    for step in range(STEPS):
        updates, moments = tx.update(gradients(params, step, scale), moments, params)
        params = apply_updates(params, updates)
        path.append(params)
    return path


def torchs(size=1.0, scale=1.0, rates=None, **options):
    params = {k: size * p for k, p in random_tree(SHAPES, 0).items()}
    optimizer, path = torch.optim.Adafactor(params.values(), **options), []
    for step in range(STEPS):
        for k, g in gradients(params, step, scale).items():
            params[k].grad = g
        if rates:
            optimizer.param_groups[0]["lr"] = rates(step)
        optimizer.step()
        path.append({k: p.detach().clone() for k, p in params.items()})
    return path


def assert_same(path, expected):
    for mine, theirs in zip(path, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


@settings(max_examples=40)
@given(
    lr=st.floats(0, 2),
    b2_decay=st.floats(-1.5, 0),
    eps1=st.floats(1e-30, 0.1),
    eps2=st.floats(0, 1),
    clip=st.floats(1, 3),
    weight_decay=st.sampled_from([0.0, 0.3]),
    size=st.sampled_from([1e-5, 1.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_it_is_torchs(lr, b2_decay, eps1, eps2, clip, weight_decay, size, scale):
    mine = adafactor(
        lr,
        weight_decay=weight_decay,
        b2_decay=b2_decay,
        eps1=eps1,
        eps2=eps2,
        clip=clip,
    )
    theirs = torchs(
        size,
        scale,
        lr=lr,
        beta2_decay=b2_decay,
        eps=(eps1, eps2),
        d=clip,
        weight_decay=weight_decay,
    )
    assert_same(ours(mine, size, scale), theirs)


def test_the_other_defaults_are_torchs():
    machine_epsilon = torch.finfo(torch.float64).eps
    assert_same(ours(adafactor(eps1=machine_epsilon)), torchs())


def test_a_schedule_bounds_the_relative_step():
    schedule = zf.optim.warmup_linear(2.0, 2, 5)
    path = ours(adafactor(schedule, weight_decay=0.1, eps1=1e-10))
    rates = [float(schedule(t)) for t in range(STEPS)]
    expected = torchs(rates=rates.__getitem__, eps=(1e-10, 1e-3), weight_decay=0.1)
    assert_same(path, expected)
    of_numbers = adafactor(lambda t: 0.5, weight_decay=0.1, eps1=1e-10)
    assert_same(ours(of_numbers), ours(adafactor(0.5, weight_decay=0.1, eps1=1e-10)))


@pytest.mark.parametrize("rate", [0.01, 0.8])
def test_the_formula_of_the_paper(rate):
    """Algorithm 4, its epsilon too small to matter, with a mean of the steps."""
    keep = 0.9
    p = random_tree(SHAPES, 0)["matrix"]
    r, c, m = torch.zeros(5, 1), torch.zeros(1, 3), torch.zeros(5, 3)
    r, c, m = r.double(), c.double(), m.double()
    tx = adafactor(rate, keep)
    params, moments = p, tx.init(p)
    for t in range(1, STEPS + 1):
        g = random_tree({"g": torch.Size([5, 3])}, t)["g"]
        updates, moments = tx.update(g, moments, params)
        params = apply_updates(params, updates)
        b2 = 1 - t**-0.8
        squares = g.square()
        r = b2 * r + (1 - b2) * squares.sum(1, keepdim=True)
        c = b2 * c + (1 - b2) * squares.sum(0, keepdim=True)
        u = g / (r @ c / r.sum()).sqrt()
        u = u / max(1.0, float(u.square().mean().sqrt()))
        alpha = max(1e-3, float(p.square().mean().sqrt())) * min(rate, t**-0.5)
        m = keep * m + (1 - keep) * alpha * u
        p = p - m
        torch.testing.assert_close(params, p, rtol=1e-12, atol=1e-14)


# --- shapes, dtypes, zeros -------------------------------------------------------


def test_its_moments_are_small():
    params = {"v": torch.ones(5), "w": torch.ones(300, 200)}
    moments = adafactor().init(params)
    assert sum(x.numel() for x in zf.tree_leaves(moments)) == 300 + 200 + 5 + 2


def test_the_decay_of_a_mask():
    params = {"bias": torch.ones(2), "w": torch.ones(2, 2)}
    tx = adafactor(0.1, weight_decay=0.5, mask=decay_matrices)
    zeros = zf.tree_map(torch.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert updates["bias"].tolist() == [0.0, 0.0]
    torch.testing.assert_close(updates["w"], torch.full((2, 2), -0.05))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_and_empty_leaves_give_zeros(dtype):
    params = {
        "none": torch.ones(0, 3, dtype=dtype),
        "nothing": torch.ones(0, dtype=dtype),
        "s": torch.ones((), dtype=dtype),
        "w": torch.zeros(3, 2, dtype=dtype),
    }
    tx = adafactor(0.1, 0.9)
    moments = tx.init(params)
    for _ in range(2):
        zeros = zf.tree_map(torch.zeros_like, params)
        updates, moments = tx.update(zeros, moments, params)
        for u in zf.tree_leaves(updates):
            assert u.dtype == torch.float32
            assert not u.any()
    g = zf.tree_map(torch.ones_like, params)
    updates, moments = tx.update(g, moments, params)
    assert all(u.isfinite().all() for u in zf.tree_leaves(updates))
    floats = [m for m in zf.tree_leaves(moments) if m.is_floating_point()]
    assert {m.dtype for m in floats} == {torch.float32}


def test_bfloat16_parameters_are_computed_in_float32():
    tx, wide = scale_by_adafactor(), random_tree(SHAPES, 0)
    narrow = zf.tree_map(torch.Tensor.bfloat16, wide)
    assert tree_structure(tx.init(narrow)) == tree_structure(tx.init(wide))
    assert_computed_in_float32(tx, wide)


def test_tiny_gradients_do_not_vanish_in_float32():
    # Their squares are 1e-34; a product of the two factors would be 0.
    tx, p = scale_by_adafactor(), torch.ones(4, 4)
    updates, _ = tx.update(torch.full((4, 4), 1e-17), tx.init(p), p)
    torch.testing.assert_close(updates, torch.ones(4, 4))


def test_what_is_not_finite_stays_visible():
    tx, p = scale_by_adafactor(), torch.ones(2, 2)
    updates, _ = tx.update(torch.tensor([[1.0, float("nan")]] * 2), tx.init(p), p)
    assert updates.isnan().all()


# --- wrong uses ------------------------------------------------------------------

BAD_VALUES = [
    (lambda: adafactor(-1), r"learning_rate is -1, .* \[0, inf\)"),
    (lambda: adafactor(momentum=1.0), r"adafactor: momentum is 1.0, .* \[0, 1\)"),
    (lambda: adafactor(weight_decay=-0.1), "weight_decay is -0.1"),
    (lambda: adafactor(b2_decay=0.8), r"b2_decay is 0.8, .*\(-inf, 0\].*-0.8"),
    (lambda: adafactor(b2_decay=float("nan")), "b2_decay is nan"),
    (lambda: adafactor(b2_decay=-float("inf")), "b2_decay is -inf"),
    (lambda: adafactor(eps1=0.0), r"eps1 is 0.0, .* \(0, inf\); .*eps1=1e-30"),
    (lambda: adafactor(eps2=-1e-3), "eps2 is -0.001, .*eps2=1e-3"),
    (lambda: adafactor(clip=0), "clip is 0, .*clip=1.0"),
]
BAD_KINDS = [
    (lambda: adafactor("fast"), "learning_rate is a str"),
    (lambda: adafactor(momentum=None), "momentum is a NoneType"),
    (lambda: adafactor(b2_decay="slow"), "b2_decay is a str"),
    (lambda: adafactor(b2_decay=False), "b2_decay is a bool"),
    (lambda: adafactor(eps1=None), "eps1 is a NoneType"),
    (lambda: adafactor(mask=True), "mask is a bool"),
]


@pytest.mark.parametrize(("make", "match"), BAD_VALUES)
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(("make", "match"), BAD_KINDS)
def test_bad_kinds(make, match):
    with pytest.raises(TypeError, match=match):
        make()


@pytest.mark.parametrize("answer", ["0.1", True, None])
def test_a_schedule_returns_a_number(answer):
    tx, p = adafactor(lambda step: answer), torch.ones(1)
    with pytest.raises(TypeError, match="expected a 0-d tensor or a number"):
        tx.update(p, tx.init(p), p)


@pytest.mark.parametrize("tx", [adafactor(), adafactor(momentum=0.9, weight_decay=0.1)])
@pytest.mark.parametrize("moments", [None, (1,), {"w": torch.ones(2)}])
def test_moments_of_something_else(tx, moments):
    p = {"w": torch.ones(2, 2)}
    with pytest.raises(zf.StructureError, match=r"moments = tx.init\(params\)"):
        tx.update(p, moments, p)
    with pytest.raises(zf.StructureError, match="missing: w"):
        tx.update({"v": torch.ones(2, 2)}, tx.init(p), p)
    mine = tx.init({"v": torch.ones(2, 2)})
    with pytest.raises(zf.StructureError, match="missing: rows/w"):
        tx.update(p, mine, p)
