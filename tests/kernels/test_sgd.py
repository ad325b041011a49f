# SPDX-License-Identifier: Apache-2.0
"""SGD over lists: the bits of the optimizer, Triton or torch, donated or not."""

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
from zfunc.kernels.sgd import sgd

NUMBERS = st.sampled_from([0.0, 0.9, torch.tensor(0.7), torch.tensor(0.7).double()])


@settings(max_examples=15)
@given(updates(["trace"]), NUMBERS, NUMBERS, st.booleans())
def test_triton_and_torch_donated_and_not(case, momentum, gain, nesterov):
    rows, options = case
    options |= {"momentum": momentum, "gain": gain, "nesterov": nesterov}
    result = donated_is_pure(sgd, rows, ("params", "trace"), **options)
    if options["finite"] is not None and not options["finite"]:
        assert all(map(torch.equal, result.params, rows["params"]))
        assert all(map(torch.equal, result.trace, rows["trace"]))


@settings(max_examples=10)
@given(updates([]))
def test_without_momentum(case):
    rows, options = case
    result = donated_is_pure(sgd, rows, ("params",), **options)
    assert result.trace == []


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("kind", KINDS[1::2])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.9, 0.0, True)],
)
def test_the_bits_of_the_optimizer(kernel, kind, momentum, dampening, nesterov):
    params = [torch.randn(s).to(kind[0]) for s in (1100, (3, 5))]
    decay = 0.1
    tx = optim.sgd(0.1, momentum, nesterov, decay, dampening)
    moments = tx.init(params)
    mine = params
    trace = [torch.zeros_like(p).to(kind[2]) for p in params] if momentum else []
    for step in range(3):
        grads = [torch.randn_like(p).to(kind[1]) for p in params]
        steps, moments = tx.update(grads, moments, params)
        params = optim.apply_updates(params, steps)
        gain = torch.tensor(1.0 - dampening * (step > 0), dtype=torch.float64)
        mine, trace, _ = sgd(
            mine,
            grads,
            trace,
            learning_rate=0.1,
            momentum=momentum,
            gain=gain,
            nesterov=nesterov,
            weight_decay=decay,
            kernel=kernel,
        )
        for got, want in zip(mine, params, strict=True):
            assert torch.equal(got, want)
        for got, want in zip(trace, moments[1].trace if trace else [], strict=True):
            assert torch.equal(got, want)


def test_it_is_torch_s_to_rounding():
    p = torch.randn(30, dtype=torch.float64)
    theirs, mine, trace = p.clone(), [p], [torch.zeros_like(p)]
    theirs.requires_grad_()
    other = torch.optim.SGD([theirs], 0.1, 0.9, weight_decay=0.01, nesterov=True)
    for _ in range(3):
        theirs.grad = torch.randn_like(p)
        other.step()
        options = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": True}
        mine, trace, _ = sgd(
            mine, [theirs.grad], trace, learning_rate=0.1, kernel="triton", **options
        )
    torch.testing.assert_close(mine[0], theirs.detach())


def test_nothing():
    for kernel in ("triton", "reference"):
        assert sgd([], [], learning_rate=0.1, kernel=kernel) == ([], [], [])


ROWS = {name: [torch.randn(4, 3)] for name in ("params", "grads", "trace")}


def step(*lists, **options):
    options = {"learning_rate": 0.1, "momentum": 0.9} | options
    return sgd(*lists, kernel="triton", **options).params[0]


def plain(*lists):
    return sgd(*lists, learning_rate=0.1, kernel="triton").params[0]


def test_tracing_and_mapping():
    traces_and_maps(step, ROWS)
    traces_and_maps(plain, {name: ROWS[name] for name in ("params", "grads")})
    donate_is_not_mapped(step, ROWS)


def test_a_derivative_is_an_error():
    no_derivative(step, ROWS)


def test_reference_gradients():
    args = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in "pgb"]
    options = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    assert torch.autograd.gradcheck(
        lambda p, g, b: torch.stack(
            [x[0] for x in sgd([p], [g], [b], nesterov=True, **options)[:2]]
        ),
        args,
    )


def test_bad_input():
    refuses(sgd, [])
    refuses(sgd, ["trace"])
    x = [torch.ones(3)]
    for momentum in (0.9, torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"sgd: momentum=.* without a trace"):
            sgd(x, x, learning_rate=0.1, momentum=momentum)
    with pytest.raises(
        ValueError, match=r"sgd: momentum=0\.0, nesterov=True without a"
    ):
        sgd(x, x, learning_rate=0.1, nesterov=True)
    with pytest.raises(TypeError, match="sgd: nesterov is int, expected True or False"):
        sgd(x, x, learning_rate=0.1, nesterov=1)
    with pytest.raises(ValueError, match="sgd: momentum is -1, expected a number"):
        sgd(x, x, x, learning_rate=0.1, momentum=-1)
    with pytest.raises(TypeError, match="sgd: trace is Tensor, expected a list"):
        sgd(x, x, x[0], learning_rate=0.1, momentum=0.9)
    with pytest.raises(TypeError, match="sgd: gain is str"):
        sgd(x, x, x, learning_rate=0.1, gain="1")
