# SPDX-License-Identifier: Apache-2.0
"""LAMB in two passes: the optimizer's formula, Triton or torch, donated or not."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.checks import EPS, close, same
from tests.kernels.updates import (
    KINDS,
    cloned,
    donate_is_not_mapped,
    equal,
    no_derivative,
    refuses,
    traces_and_maps,
    updates,
)
from zfunc import optim
from zfunc.kernels.lamb import lamb, lamb_apply, lamb_moments, trust_ratios
from zfunc.kernels.square_root import square_root

NUMBERS = st.sampled_from([0.1, 1.0, torch.tensor(0.37, dtype=torch.float64)])
BOUND = 80 * EPS[torch.float32]  # of a sum of squares, see test_global_norm.py


@settings(max_examples=8)
@given(updates(["mu", "nu"]), NUMBERS, NUMBERS, st.sampled_from([0.0, 1e-8, 0.1]))
def test_both_passes_donated_and_not(case, weight1, weight2, eps):
    rows, options = case
    rate, copy = options.pop("learning_rate"), options.pop("copy_dtype")
    weights = {"weight1": weight1, "weight2": weight2, "eps": eps}
    first = options | weights | {"b1": 0.8, "b2": 0.99}
    options.pop("coefficient")
    second = options | weights | {"learning_rate": rate, "copy_dtype": copy}

    want = lamb_moments(*rows.values(), **first, kernel="reference")
    got = lamb_moments(*rows.values(), **first, kernel="triton")
    again = lamb_moments(*rows.values(), **first, kernel="triton")
    own = cloned(rows)
    over = lamb_moments(*own.values(), **first, kernel="triton", donate=True)
    for found in (got, again, over):
        equal(found[:2], want[:2])
        assert torch.equal(found.sums, got.sums)
    assert got.sums.dtype == want.sums.dtype
    assert ((got.sums - want.sums).abs() <= 2 * BOUND * want.sums).all()
    same([*over.mu, *over.nu], [*own["mu"], *own["nu"]])
    if options["finite"] is not None and not options["finite"]:
        same([*got.mu, *got.nu], [*rows["mu"], *rows["nu"]])

    ratios = trust_ratios(got.sums, kernel="triton")
    close(ratios, trust_ratios(got.sums, kernel="reference"), 0.0)
    lists = rows["params"], got.mu, got.nu
    want = lamb_apply(*lists, ratios, **second, kernel="reference")
    equal(lamb_apply(*lists, ratios, **second, kernel="triton"), want)
    for kernel in ("triton", "reference"):
        params = cloned(rows)["params"]
        over = lamb_apply(
            params, *lists[1:], ratios, **second, donate=True, kernel=kernel
        )
        equal(over, want)
        assert all(x is y for x, y in zip(over.params, params, strict=True))
    whole = lamb(*rows.values(), **first, learning_rate=rate, copy_dtype=copy,
                 kernel="triton")  # fmt: skip
    equal(whole, (want.params, got.mu, got.nu, want.copies))


def rounded_root(x):
    """torch's square root, which on a CPU is not always the nearest number."""
    return torch.from_numpy(np.sqrt(x.numpy(), out=np.empty_like(x.numpy())))


@pytest.mark.parametrize(
    ("kind", "eps", "bias_correction"),
    list(zip(KINDS, (0.0, 1e-6) * 3, (True, True, False) * 2, strict=True)),
)
def test_the_optimizer(kind, eps, bias_correction):
    """Its moments, and its parameters but for the order in which norms add up."""
    params = [torch.randn(s).to(kind[0]) for s in (1100, (3, 5), 7)]
    params[2].zero_()  # a norm of 0: the ratio is 1
    tx = optim.lamb(
        0.1,
        eps=eps,
        weight_decay=0.1,
        mask=lambda path, leaf: leaf.dim() == 1,
        bias_correction=bias_correction,
        max_coeff=3.0,
        min_coeff=0.5,
    )
    moments = tx.init(params)
    mu, nu = moments[0].mu, moments[0].nu
    for step in range(2):
        grads = [torch.randn_like(p).to(kind[1]) for p in params]
        grads[1][0] = 0.0
        weights = [1 - b ** (step + 1) for b in (0.9, 0.999)]
        options = dict(zip(("weight1", "weight2"), weights, strict=True))
        mine = lamb(
            params,
            grads,
            mu,
            nu,
            learning_rate=0.1,
            **(options if bias_correction else {}),
            eps=eps,
            weight_decay=[0.1, 0.0, 0.1],
            max_coeff=3.0,
            min_coeff=0.5,
            kernel="triton",
        )
        with mock.patch.object(torch.Tensor, "sqrt", rounded_root):
            steps, moments = tx.update(grads, moments, params)
        params = optim.apply_updates(params, steps)
        mu, nu = moments[0].mu, moments[0].nu
        same([*mine.mu, *mine.nu], [*mu, *nu])
        for got, want in zip(mine.params, params, strict=True):
            assert got.dtype == want.dtype
            close(got, want, BOUND + EPS[kind[0]] * 2)


@pytest.mark.parametrize("kind", KINDS[::2])
def test_the_optimizer_s_bits_with_its_ratios(kind):
    """One leaf at a time, whose ratio is what the optimizer computed."""
    tx = optim.lamb(0.1, weight_decay=0.1)
    params = [torch.randn(1300).to(kind[0])]
    moments, mu, nu = (
        tx.init(params),
        *([torch.zeros(1300, dtype=kind[2])] for _ in "mn"),
    )
    for step in range(2):
        grads = [torch.randn(1300).to(kind[1])]
        weights = [1 - torch.tensor(b).double().fill_(b) ** (step + 1)
                   for b in (0.9, 0.999)]  # fmt: skip
        seen = []

        def clamp(x, *bounds, seen=seen):
            seen.append(CLAMP(x, *bounds))
            return seen[-1]

        with (
            mock.patch.object(torch.Tensor, "sqrt", rounded_root),
            mock.patch.object(torch.Tensor, "clamp", clamp),
        ):
            steps, moments = tx.update(grads, moments, params)
        options = {"weight1": weights[0], "weight2": weights[1], "weight_decay": 0.1}
        mu, nu, _ = lamb_moments(params, grads, mu, nu, **options, kernel="triton")
        mine = lamb_apply(
            params, mu, nu, torch.stack(seen[:1]), learning_rate=0.1, **options,
            kernel="triton",
        )  # fmt: skip
        params = optim.apply_updates(params, steps)
        same(mine.params, params)


CLAMP = torch.Tensor.clamp


def test_pieces_of_a_tensor_add_up():
    """What ranks do: sums of pieces, added, make the ratio of the whole."""
    whole = {name: torch.randn(3000).abs() for name in ("params", "grads", "mu", "nu")}
    pieces = [[x[:1300], x[1300:]] for x in whole.values()]
    weights = {"weight1": 0.2, "weight2": 0.3, "weight_decay": 0.1}
    mu, nu, sums = lamb_moments(*pieces, **weights, kernel="triton")
    ratios = trust_ratios(sums.sum(0, keepdim=True), kernel="triton").expand(2)
    new = lamb_apply(
        pieces[0], mu, nu, ratios, learning_rate=0.1, **weights, kernel="triton"
    ).params
    want = lamb(*([x] for x in whole.values()), learning_rate=0.1, **weights).params
    close(torch.cat(new), want[0], BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratios(dtype):
    sums = torch.tensor(
        [[4.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1e8], [1e8, 1.0]]
    ).to(dtype)
    for kernel in ("triton", "reference"):
        ratios = trust_ratios(sums, kernel=kernel)
        assert ratios.dtype == dtype
        assert ratios.tolist() == [2.0, 1.0, 1.0, 1.0, ratios[4].item(), 10.0]
        assert ratios[4] == torch.tensor(0.01, dtype=dtype)
        own = trust_ratios(sums, max_coeff=1.3, min_coeff=0.1, kernel=kernel)
        assert own[0] == torch.tensor(1.3, dtype=dtype)
        assert trust_ratios(sums.T.contiguous().T, kernel=kernel).equal(ratios)
        assert trust_ratios(sums[:0], kernel=kernel).shape == (0,)
    many = torch.rand(2100, 2)
    same(trust_ratios(many, kernel="triton"), trust_ratios(many, kernel="reference"))


def test_nothing():
    for kernel in ("triton", "reference"):
        empty = lamb([], [], [], [], learning_rate=0.1, kernel=kernel)
        assert empty == ([], [], [], [])
        x = [torch.ones(0)]
        sums = lamb_moments(x, x, x, x, kernel=kernel).sums
        assert sums.tolist() == [[0.0, 0.0]]


ROWS = {name: [torch.randn(4, 3).abs()] for name in ("params", "grads", "mu", "nu")}


def step(*lists, **options):
    return lamb(*lists, learning_rate=0.1, kernel="triton", **options).params[0]


def test_tracing_and_mapping():
    traces_and_maps(step, ROWS)
    donate_is_not_mapped(step, ROWS)
    with pytest.raises(RuntimeError, match="lamb_apply: donate=True under vmap"):
        torch.func.vmap(
            lambda x: lamb_apply(
                [x], *([ROWS[n][0]] for n in ("mu", "nu")), torch.ones(1),
                learning_rate=0.1, donate=True, kernel="triton",
            ).params[0]
        )(torch.ones(2, 4, 3))  # fmt: skip


def test_a_derivative_is_an_error():
    no_derivative(step, ROWS)
    for fn in (
        lambda x: trust_ratios(x, kernel="triton").sum(),
        lambda x: lamb_apply(
            *([torch.ones(1)] for _ in "pmn"), x[0, :1], learning_rate=0.1,
            kernel="triton",
        ).params[0].sum(),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match='Pass kernel="reference"'):
            torch.func.grad(fn)(torch.ones(1, 2))


def test_reference_gradients():
    args = [(torch.rand(3, dtype=torch.float64) + 0.5).requires_grad_() for _ in "pgmn"]
    assert torch.autograd.gradcheck(
        lambda *xs: lamb(*([x] for x in xs), learning_rate=0.1, weight_decay=0.1)[0][0],
        args,
    )


def test_roots_are_rounded_to_nearest():
    x = torch.rand(5000)
    assert torch.equal(square_root(x), rounded_root(x))


def test_bad_input():
    refuses(lamb, ["mu", "nu"])
    x = [torch.ones(3)]
    with pytest.raises(ValueError, match=r"lamb_apply: ratios has shape \(2,\), expec"):
        lamb_apply(x, x, x, torch.ones(2), learning_rate=0.1)
    with pytest.raises(ValueError, match=r"trust_ratios: sums has shape \(3,\), expec"):
        trust_ratios(torch.ones(3))
    with pytest.raises(TypeError, match=r"trust_ratios: sums is torch.float16, expect"):
        trust_ratios(torch.ones(3, 2).half())
    with pytest.raises(ValueError, match=r"min_coeff is 2.0 and max_coeff is 1.0, exp"):
        lamb(x, x, x, x, learning_rate=0.1, max_coeff=1.0, min_coeff=2.0)
    with pytest.raises(ValueError, match=r"lamb_moments: b2 is 1.0, expected a number"):
        lamb(x, x, x, x, learning_rate=0.1, b2=1.0)
    with pytest.raises(TypeError, match=r"lamb_moments: eps is str, expected a number"):
        lamb(x, x, x, x, learning_rate=0.1, eps="0")
    with pytest.raises(ValueError, match=r"lamb_moments: weight1 has shape \(3,\)"):
        lamb(x, x, x, x, learning_rate=0.1, weight1=x[0])
