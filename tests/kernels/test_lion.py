# SPDX-License-Identifier: Apache-2.0
"""Lion over lists: the bits of the optimizer, Triton or torch, donated or not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.updates import (
    KINDS,
    donate_is_not_mapped,
    donated_is_pure,
    no_derivative,
    refuses,
    traces_and_maps,
    updates,
)
from zfunc import optim
from zfunc.kernels.lion import lion

FACTORS = st.sampled_from([0.0, 0.9, 0.95])


@settings(max_examples=15)
@given(updates(["mu"]), FACTORS, FACTORS)
def test_triton_and_torch_donated_and_not(case, b1, b2):
    rows, options = case
    result = donated_is_pure(lion, rows, ("params", "mu"), b1=b1, b2=b2, **options)
    if options["finite"] is not None and not options["finite"]:
        assert all(map(torch.equal, result.params, rows["params"]))
        assert all(map(torch.equal, result.mu, rows["mu"]))
    if copy := options["copy_dtype"]:
        for x, y in zip(result.copies, result.params, strict=True):
            assert torch.equal(x, y.to(copy))


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_bits_of_the_optimizer(kernel, kind, decay):
    params = [torch.randn(s).to(kind[0]) for s in (1100, (3, 5))]
    tx = optim.lion(
        optim.warmup_linear(0.1, 2, 9),
        b1=0.8,
        weight_decay=decay,
        mask=lambda path, leaf: leaf.dim() == 1,
    )
    moments, mu = tx.init(params), [torch.zeros_like(p).to(kind[2]) for p in params]
    mine = params
    for step in range(3):
        grads = [torch.randn_like(p).to(kind[1]) for p in params]
        rate = optim.warmup_linear(0.1, 2, 9)(torch.tensor(step))
        steps, moments = tx.update(grads, moments, params)
        params = optim.apply_updates(params, steps)
        mine, mu, _ = lion(
            mine,
            grads,
            mu,
            learning_rate=rate,
            b1=0.8,
            weight_decay=[decay, 0.0],
            kernel=kernel,
        )
        for got, want in zip((*mine, *mu), (*params, *moments[0].mu), strict=True):
            assert torch.equal(got, want)


def test_a_coefficient_is_a_clip():
    p, g, m = ([torch.randn(50)] for _ in range(3))
    factor = torch.tensor(0.3)
    a = lion(p, g, m, learning_rate=0.1, coefficient=factor, kernel="triton")
    b = lion(p, [g[0] * factor], m, learning_rate=0.1)
    assert torch.equal(a.mu[0], b.mu[0])


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_gradients_that_are_not_finite(kernel):
    p, m = [torch.zeros(3)], [torch.zeros(3)]
    g = [torch.tensor([math.nan, math.inf, -math.inf])]
    new = lion(p, g, m, learning_rate=1.0, kernel=kernel)
    assert new.params[0].tolist() == [0.0, -1.0, 1.0]
    assert not new.mu[0].isfinite().any()
    kept = lion(p, g, m, learning_rate=1.0, finite=torch.tensor(False), kernel=kernel)
    assert kept.mu[0].tolist() == kept.params[0].tolist() == [0.0, 0.0, 0.0]


def test_nothing():
    for kernel in ("triton", "reference"):
        assert lion([], [], [], learning_rate=0.1, kernel=kernel) == ([], [], [])
        assert lion(
            [torch.ones(0)], [torch.ones(0)], [torch.ones(0)], learning_rate=0.1,
            kernel=kernel,
        ).params[0].shape == (0,)  # fmt: skip


ROWS = {name: [torch.randn(4, 3)] for name in ("params", "grads", "mu")}


def step(*lists, **options):
    return lion(*lists, learning_rate=0.1, kernel="triton", **options).params[0]


def test_tracing_and_mapping():
    traces_and_maps(step, ROWS)
    donate_is_not_mapped(step, ROWS)


def test_a_derivative_is_an_error():
    no_derivative(step, ROWS)


def test_reference_gradients():
    p, m = (torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in "pm")
    g = torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda p, m: (
            lion([p], [g], [m], learning_rate=0.1, weight_decay=0.1)[:2][1][0]
            + lion([p], [g], [m], learning_rate=0.1, weight_decay=0.1)[0][0]
        ),
        (p, m),
    )


def test_bad_input():
    refuses(lion, ["mu"])
    x = [torch.ones(3)]
    for options, message in (
        ({"b1": 1.0}, r"lion: b1 is 1.0, expected a number in \[0, 1\)"),
        ({"b2": -0.5}, r"lion: b2 is -0.5, expected a number in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lion(x, x, x, learning_rate=0.1, **options)
    with pytest.raises(TypeError, match="lion: b1 is Tensor, expected a number"):
        lion(x, x, x, learning_rate=0.1, b1=torch.ones(()))
