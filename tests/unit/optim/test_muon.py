# SPDX-License-Identifier: Apache-2.0
"""Muon: ``torch.optim.Muon`` and ``torch.optim.AdamW``, and Newton-Schulz itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim._muon import _zeropower_via_newtonschulz

import zfunc as zf
from tests.unit.optim.leafwise import (
    assert_computed_in_float32,
    assert_zeros_stay_zeros,
)
from zfunc.core.tree import leaves_with_path
from zfunc.models import gpt
from zfunc.models.gpt_config import GPTConfig
from zfunc.optim import (
    apply_updates,
    hidden_matrices,
    muon,
    scale_by_muon,
)
from zfunc.optim.orthogonal import orthogonalized
from zfunc.testing import random_tree

STEPS = 5
MATRICES = {
    "square": torch.Size([4, 4]),
    "tall": torch.Size([7, 3]),
    "wide": torch.Size([2, 5]),
    "wider": torch.Size([2, 5]),
}
REST = {"b": torch.Size([3]), "embedding": torch.Size([6, 2]), "s": torch.Size([])}
SHAPES = {**MATRICES, **REST}


def gradients(params, step):
    """They depend on the parameters, so that a wrong step makes the next ones wrong."""
    noise = random_tree(SHAPES, 100 + step)
    return {k: 0.5 * p.detach() + noise[k] for k, p in params.items()}


def ours(tx):
    params = random_tree(SHAPES, 0)
    moments, path = tx.init(params), []
    for step in range(STEPS):
        updates, moments = tx.update(gradients(params, step), moments, params)
        params = apply_updates(params, updates)
        path.append(params)
    return path


def torchs(of_muon, of_adamw):
    params, path = random_tree(SHAPES, 0), []
    matrices, rest = ([params[k] for k in keys] for keys in (MATRICES, REST))
    optimizers = (
        torch.optim.Muon(matrices, **of_muon),
        torch.optim.AdamW(rest, **of_adamw),
    )
    for step in range(STEPS):
        for k, g in gradients(params, step).items():
            params[k].grad = g
        # torch iterates in bfloat16; here in the dtype of the matrices.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "bfloat16", lambda x: x.clone())
            for optimizer in optimizers:
                optimizer.step()
        path.append({k: p.detach().clone() for k, p in params.items()})
    return path


@settings(max_examples=40)
@given(
    lr=st.floats(0, 0.5),
    adam_lr=st.floats(0, 0.5),
    momentum=st.floats(0, 0.99),
    nesterov=st.booleans(),
    scale=st.sampled_from(["original", "match_rms_adamw"]),
    num_steps=st.integers(1, 6),
    b1=st.floats(0, 0.99),
    b2=st.floats(0, 0.999),
    eps=st.floats(1e-10, 1e-3),
    weight_decay=st.floats(0, 1),
)
def test_it_is_torchs(
    lr,
    adam_lr,
    momentum,
    nesterov,
    scale,
    num_steps,
    b1,
    b2,
    eps,
    weight_decay,
):
    mine = muon(
        lr,
        momentum,
        weight_decay,
        nesterov=nesterov,
        num_steps=num_steps,
        scale=scale,
        adam_learning_rate=adam_lr,
        b1=b1,
        b2=b2,
        eps=eps,
    )
    of_muon = {
        "lr": lr,
        "momentum": momentum,
        "nesterov": nesterov,
        "adjust_lr_fn": scale,
        "ns_steps": num_steps,
        "weight_decay": weight_decay,
    }
    of_adamw = {
        "lr": adam_lr,
        "betas": (b1, b2),
        "eps": eps,
        "weight_decay": weight_decay,
    }
    for got, want in zip(ours(mine), torchs(of_muon, of_adamw), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_each_of_the_two_has_its_schedule():
    rates = zf.optim.warmup_linear(0.2, 2, 6), zf.optim.warmup_cosine(0.1, 0, 6)
    path = ours(muon(rates[0], adam_learning_rate=rates[1]))
    at_zero = muon(0.0, adam_learning_rate=0.1)
    assert torch.equal(path[0]["tall"], random_tree(SHAPES, 0)["tall"])
    want = ours(at_zero)[0]
    torch.testing.assert_close(path[0], want, rtol=1e-12, atol=1e-13)


# --- Newton-Schulz ---------------------------------------------------------------


def quintic(x, num_steps):
    """By the singular values: the iteration is an odd polynomial of each."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / max(float(x.norm()), 1e-7)
    for _ in range(num_steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag_embed(s) @ v


@pytest.mark.parametrize("shape", [(4, 4), (7, 3), (3, 7), (1, 5), (5, 1), (2, 3, 4)])
@pytest.mark.parametrize("num_steps", [1, 5])
def test_it_maps_the_singular_values(shape, num_steps):
    x = random_tree(torch.Size(shape), 0)
    if len(shape) == 3:
        want = torch.stack([quintic(m, num_steps) for m in x])
    else:
        want = quintic(x, num_steps)
    torch.testing.assert_close(orthogonalized(x, num_steps), want, rtol=0, atol=1e-12)


def test_five_steps_are_about_orthogonal():
    s = torch.linspace(0.02, 1, 1000, dtype=torch.float64)
    pairs = torch.diag_embed(torch.stack([torch.ones_like(s), s], 1))
    made = orthogonalized(pairs).diagonal(dim1=-2, dim2=-1)
    assert 0.68 < made.min() < made.max() < 1.14


def test_bfloat16_is_about_the_same():
    x = random_tree(torch.Size([20, 12]), 0, dtype=torch.float32)
    exact, narrow = orthogonalized(x), orthogonalized(x, dtype=torch.bfloat16)
    assert narrow.dtype == torch.float32
    assert 1e-4 < (narrow - exact).abs().max() < 0.05


def test_bfloat16_is_torchs():
    x = random_tree(torch.Size([20, 12]), 0, dtype=torch.float32)
    theirs = _zeropower_via_newtonschulz(x, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    mine = orthogonalized(x, dtype=torch.bfloat16)
    assert torch.equal(mine, theirs.float())


# --- which leaves ----------------------------------------------------------------


def test_the_default_mask_knows_our_models_and_those_of_others():
    w = torch.ones(4, 4)
    for path in (
        "layers/0/attn/q",
        "model.layers.0.mlp.up_proj.weight",
        "layers/3/mlp/down",
        "h/0/attn/c_attn/weight",
    ):
        assert hidden_matrices(path, w)
        assert not hidden_matrices(path, torch.ones(4))
        assert not hidden_matrices(path, torch.ones(4, 4, 4))
    assert hidden_matrices("multihead/q", w)
    for path in ("embedding", "head", "model.embed_tokens.weight", "lm_head.weight"):
        assert not hidden_matrices(path, w)
    config = GPTConfig(d_model=8, n_layers=1, n_heads=2, n_kv_heads=2, d_ff=8)
    paths = dict(leaves_with_path(gpt.init(config, seed=0)))
    picked = {p for p, leaf in paths.items() if hidden_matrices(p, leaf)}
    assert picked == {p for p in paths if "/attn/" in p or "/mlp/" in p}


def test_the_moments_of_matrices_are_half_of_adams():
    params = random_tree(SHAPES, 0)
    moments = scale_by_muon().init(params)
    for k, p in params.items():
        assert moments.mu[k].shape == p.shape
        assert moments.nu[k].numel() == (p.numel() if k in REST else 0)


@pytest.mark.parametrize("mask", [lambda p, x: True, lambda p, x: False])
def test_all_leaves_or_none(mask):
    params = {"a": torch.ones(2, 2), "b": torch.ones(3, 2, 2)}
    tx = muon(mask=mask)
    moments = tx.init(params)
    for _ in range(2):
        updates, moments = tx.update(params, moments, params)
        assert all(u.isfinite().all() and u.any() for u in updates.values())


def test_a_stack_is_its_matrices():
    stack = random_tree(torch.Size([3, 5, 2]), 0)
    each = list(stack.unbind(0))
    tx = scale_by_muon(mask=lambda p, x: True)
    got, _ = tx.update(stack, tx.init(stack), stack)
    want, _ = tx.update(each, tx.init(each), each)
    torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-14)


def test_the_decay_has_a_mask_of_its_own():
    params = {"b": torch.ones(2), "w": torch.ones(2, 2)}
    tx = muon(0.1, weight_decay=0.5, decay_mask=zf.optim.decay_matrices)
    zeros = zf.tree_map(torch.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert not updates["b"].any()
    torch.testing.assert_close(updates["w"], torch.full((2, 2), -0.05))


# --- shapes, dtypes, zeros -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arithmetic", [None, torch.bfloat16])
def test_zeros_and_empty_leaves_give_zeros(dtype, arithmetic):
    assert_zeros_stay_zeros(muon(dtype=arithmetic), dtype)


def test_bfloat16_parameters_are_computed_in_float32():
    assert_computed_in_float32(scale_by_muon(), random_tree(SHAPES, 0))


# --- wrong uses ------------------------------------------------------------------

BAD_VALUES = [
    (lambda: muon(-1), r"learning_rate is -1, .* \[0, inf\)"),
    (lambda: muon(adam_learning_rate=-1), "learning_rate is -1"),
    (lambda: muon(momentum=1.0), r"momentum is 1.0, .* \[0, 1\); .*momentum=0.95"),
    (lambda: muon(weight_decay=-0.1), "weight_decay is -0.1"),
    (lambda: muon(num_steps=0), "num_steps is 0, expected an int >= 1"),
    (lambda: muon(scale="rms"), "scale is 'rms', expected 'original' or 'match_rms"),
    (lambda: muon(b2=1.0), "b2 is 1.0"),
    (lambda: muon(eps=-1.0), "eps is -1.0"),
]
BAD_KINDS = [
    (lambda: muon("fast"), "learning_rate is a str"),
    (lambda: muon(nesterov=1), "nesterov is a int, expected True or False"),
    (lambda: muon(num_steps=5.0), "num_steps is a float, expected an int"),
    (lambda: muon(dtype="bf16"), "dtype is 'bf16', .*dtype=torch.bfloat16"),
    (lambda: muon(dtype=torch.int32), "dtype is torch.int32"),
    (lambda: muon(mask=["w"]), "mask is a list, .*mask=hidden_matrices"),
    (lambda: muon(decay_mask=True), "mask is a bool"),
]


@pytest.mark.parametrize(("make", "match"), BAD_VALUES)
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(("make", "match"), BAD_KINDS)
def test_bad_kinds(make, match):
    with pytest.raises(TypeError, match=match):
        make()


def test_masks_that_answer_something_else():
    p = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    tx = muon(mask=lambda path, leaf: 1)
    with pytest.raises(TypeError, match=r"mask\('b', leaf\) returned a int"):
        tx.init(p)
    tx = muon(mask=lambda path, leaf: True)
    with pytest.raises(ValueError, match=r"mask\('b', leaf\) is True .* \(2,\)"):
        tx.update(p, tx.init(p), p)


@pytest.mark.parametrize("moments", [None, (1,), {"w": torch.ones(2)}])
def test_moments_of_something_else(moments):
    tx, p = scale_by_muon(), {"w": torch.ones(2, 2)}
    for wrong in (tx, muon()):
        with pytest.raises(zf.StructureError, match=r"moments = tx.init\(params\)"):
            wrong.update(p, moments, p)
    with pytest.raises(zf.StructureError, match="missing: w"):
        tx.update({"v": torch.ones(2, 2)}, tx.init(p), p)
    mine = tx.init({"v": torch.ones(2, 2)})
    with pytest.raises(zf.StructureError, match="missing: mu/w"):
        tx.update(p, mine, p)
