# SPDX-License-Identifier: Apache-2.0
"""LAMB: the paper's algorithm 2 in float64, step by step, and its trust ratio."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.optim.leafwise import (
    assert_computed_in_float32,
    assert_zeros_stay_zeros,
)
from zfunc.optim import adamw, apply_updates, lamb, scale_by_trust_ratio
from zfunc.testing import random_tree

STEPS = 5
SHAPES = {
    "b": torch.Size([3]),
    "s": torch.Size([]),
    "w": torch.Size([5, 3]),
    "zero": torch.Size([2, 2]),
}


def start(size=1.0):
    params = {k: size * p for k, p in random_tree(SHAPES, 0).items()}
    return {**params, "zero": torch.zeros_like(params["zero"])}


def gradients(params, step):
    """They depend on the parameters, so that a wrong step makes the next ones wrong."""
    noise = random_tree(SHAPES, 100 + step)
    return {k: 0.5 * p + noise[k] for k, p in params.items()}


def ours(tx, size=1.0):
    params = start(size)
    moments, path = tx.init(params), []
    for step in range(STEPS):
        updates, moments = tx.update(gradients(params, step), moments, params)
        params = apply_updates(params, updates)
        path.append(params)
    return path


def papers(lr, b1, b2, eps, decay, corrected, high, low, size):
    params = {k: p.clone() for k, p in start(size).items()}
    m = {k: torch.zeros_like(p) for k, p in params.items()}
    v, path = {k: torch.zeros_like(p) for k, p in params.items()}, []
    for t in range(1, STEPS + 1):
        for k, g in gradients(params, t - 1).items():
            m[k] = b1 * m[k] + (1 - b1) * g
            v[k] = b2 * v[k] + (1 - b2) * g * g
            m_hat = m[k] / (1 - b1**t) if corrected else m[k]
            v_hat = v[k] / (1 - b2**t) if corrected else v[k]
            u = m_hat / (v_hat.sqrt() + eps) + decay * params[k]
            norms = float(params[k].norm()), float(u.norm())
            ratio = min(max(norms[0] / norms[1], low), high) if all(norms) else 1.0
            params[k] = params[k] - lr * ratio * u
        path.append(dict(params))
    return path


@settings(max_examples=50)
@given(
    lr=st.floats(0, 0.5),
    b1=st.floats(0, 0.999),
    b2=st.floats(0, 0.999),
    eps=st.floats(1e-10, 1.0),
    decay=st.sampled_from([0.0, 0.3]),
    corrected=st.booleans(),
    high=st.floats(0.1, 20),
    low=st.floats(0, 0.1),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_it_is_the_papers(lr, b1, b2, eps, decay, corrected, high, low, size):
    tx = lamb(
        lr,
        b1,
        b2,
        eps,
        decay,
        bias_correction=corrected,
        max_coeff=high,
        min_coeff=low,
    )
    want = papers(lr, b1, b2, eps, decay, corrected, high, low, size)
    for mine, theirs in zip(ours(tx, size), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-13)


def test_without_room_for_a_ratio_it_is_adamw():
    tx = lamb(0.1, weight_decay=0.2, max_coeff=1.0, min_coeff=1.0)
    want = ours(adamw(0.1, weight_decay=0.2))
    for mine, theirs in zip(ours(tx), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_a_schedule_and_a_mask():
    rate, mask = zf.optim.warmup_linear(0.2, 2, 6), zf.optim.decay_matrices
    first = ours(lamb(rate, weight_decay=0.3, mask=mask))[0]
    torch.testing.assert_close(first, start(), rtol=0, atol=0)
    zeros = zf.tree_map(torch.zeros_like, start())
    tx = lamb(0.1, weight_decay=0.3, mask=mask)
    updates, _ = tx.update(zeros, tx.init(start()), start())
    assert not updates["b"].any()
    # The ratio undoes the 0.3: |p| / |0.3 p|.
    torch.testing.assert_close(updates["w"], -0.1 * start()["w"])


# --- the trust ratio ---------------------------------------------------------------


def ratio(p_norm, u_norm, tx=None):
    tx = tx or scale_by_trust_ratio()
    p, u = torch.tensor([p_norm, 0.0]), torch.tensor([0.0, u_norm])
    updates, _ = tx.update(u, tx.init(p), p)
    return float(updates[1]) / u_norm if u_norm else float(updates.abs().sum())


def test_the_ratio_and_its_bounds():
    assert ratio(3.0, 2.0) == 1.5
    assert ratio(300.0, 2.0) == 10.0
    assert ratio(0.5, 128.0) == pytest.approx(0.01)
    assert ratio(3.0, 2.0, scale_by_trust_ratio(1.25, 0.5)) == 1.25
    assert ratio(1.0, 4.0, scale_by_trust_ratio(1.25, 0.5)) == 0.5


def test_the_ratio_is_1_where_a_norm_is_0():
    assert ratio(0.0, 2.0) == 1.0
    assert ratio(2.0, 0.0) == 0.0
    assert ratio(0.0, 2.0, scale_by_trust_ratio(0.5)) == 1.0


def test_what_is_not_finite_stays_visible():
    tx, p = scale_by_trust_ratio(), torch.ones(2)
    updates, _ = tx.update(torch.tensor([1.0, float("nan")]), (), p)
    assert updates.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("corrected", [True, False])
def test_zeros_and_empty_leaves_give_zeros(dtype, corrected):
    tx = lamb(0.1, eps=0.0, bias_correction=corrected)
    assert_zeros_stay_zeros(tx, dtype)


def test_bfloat16_parameters_are_computed_in_float32():
    assert_computed_in_float32(lamb(0.1, weight_decay=0.1), random_tree(SHAPES, 0))


# --- wrong uses ------------------------------------------------------------------

BAD_VALUES = [
    (lambda: lamb(-1), r"learning_rate is -1, .* \[0, inf\)"),
    (lambda: lamb(0.1, b1=1.0), r"lamb: b1 is 1.0, .* \[0, 1\); .*b1=0.9"),
    (lambda: lamb(0.1, b2=1.0), "b2 is 1.0"),
    (lambda: lamb(0.1, eps=-1.0), "eps is -1.0"),
    (lambda: lamb(0.1, weight_decay=-0.1), "weight_decay is -0.1"),
    (lambda: lamb(0.1, max_coeff=0.0), r"max_coeff is 0.0, .*\(0, inf\)"),
    (lambda: lamb(0.1, min_coeff=-0.1), "min_coeff is -0.1, .*min_coeff=0.01"),
    (
        lambda: scale_by_trust_ratio(0.5, 0.6),
        "min_coeff is 0.6 and max_coeff is 0.5, expected min_coeff <= max_coeff",
    ),
]
BAD_KINDS = [
    (lambda: lamb("fast"), "learning_rate is a str"),
    (lambda: lamb(0.1, b1=lambda t: 0.9), "lamb: b1 is a function"),
    (lambda: lamb(0.1, bias_correction=1), "bias_correction is a int, .*True or False"),
    (lambda: lamb(0.1, max_coeff=None), "max_coeff is a NoneType"),
    (lambda: lamb(0.1, mask=True), "mask is a bool"),
]


@pytest.mark.parametrize(("make", "match"), BAD_VALUES)
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(("make", "match"), BAD_KINDS)
def test_bad_kinds(make, match):
    with pytest.raises(TypeError, match=match):
        make()


@pytest.mark.parametrize("tx", [lamb(0.1), lamb(0.1, bias_correction=False)])
@pytest.mark.parametrize("moments", [None, (1,), {"w": torch.ones(2)}])
def test_moments_of_something_else(tx, moments):
    p = {"w": torch.ones(2)}
    with pytest.raises(zf.StructureError, match=r"moments = tx.init\(params\)"):
        tx.update(p, moments, p)
    with pytest.raises(zf.StructureError, match="missing: mu/w"):
        tx.update(p, tx.init({"v": torch.ones(2)}), p)


def test_updates_of_other_parameters():
    with pytest.raises(zf.StructureError, match="missing: w"):
        scale_by_trust_ratio().update({"v": torch.ones(2)}, (), {"w": torch.ones(2)})
