# SPDX-License-Identifier: Apache-2.0
"""GEGLU: Triton against float64 and under every transformation, in both forms."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings

from tests.kernels.checks import backward_is_honoured, same, under_transforms
from tests.kernels.elementwise import (
    DTYPES,
    EXTREMES,
    LAYOUTS,
    SHAPES,
    laid,
    normal,
    wide_eps,
    within,
)
from zfunc.kernels import geglu as module

FORMS = pytest.mark.parametrize("form", ["none", "tanh"])


def triton(gate, up, form="none"):
    return module.geglu(gate, up, approximate=form, kernel="triton")


def exactly(gate, up, form):
    return module.geglu_reference(gate.double(), up.double(), approximate=form)


@FORMS
@settings(max_examples=25)
@given(SHAPES, DTYPES, LAYOUTS, LAYOUTS)
def test_the_kernel_is_the_formula(form, shape, dtype, first, second):
    torch.manual_seed(0)
    gate, up = (laid(normal(shape, dtype), layout) for layout in (first, second))
    grad = laid(normal(shape, dtype, 1.0), first)
    out, pull = torch.func.vjp(partial(triton, form=form), gate, up)
    exact, exact_pull = torch.func.vjp(
        partial(exactly, form=form), gate.double(), up.double()
    )
    assert out.dtype == dtype
    assert out.is_contiguous()
    # The distribution is off by 4 roundings of 1 (erf has 2 units in the last place),
    # the density by 3 + g * g, which its size outweighs: 0.4 g^3 exp(-g^2 / 2) < 0.5.
    room = 16 * wide_eps(dtype) + 32 * 2.0**-53  # and torch in float64 is off by 32
    size = gate.double().abs().clamp(min=1)
    within(out, exact, room * size * up.double().abs())
    grads, exact_grads = pull(grad), exact_pull(grad.double())
    within(grads[0], exact_grads[0], room * (grad.double() * up.double()).abs())
    within(grads[1], exact_grads[1], room * size * grad.double().abs())


@FORMS
def test_near_zero_to_relative_accuracy(form):
    gate = torch.logspace(-30, -3, 100) * torch.tensor([1.0, -1.0]).repeat(50)
    got = triton(gate, torch.ones(100), form).double()
    exact = exactly(gate, torch.ones(100), form)
    assert bool(((got - exact).abs() <= 8 * 2.0**-24 * exact.abs()).all())


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_extremes(form, dtype):
    gate = torch.tensor(EXTREMES).to(dtype)
    out, pull = torch.func.vjp(partial(triton, form=form), gate, torch.ones_like(gate))
    gate_grad, up_grad = pull(torch.ones_like(gate))
    same([out, up_grad], [gate.clamp(min=0)] * 2)
    same([gate_grad], [torch.where(gate == 0, 0.5, (gate > 0).to(dtype)).to(dtype)])
    nan = triton(gate.new_tensor([torch.nan]), gate.new_ones(1), form)
    assert nan.isnan().all()


@FORMS
def test_every_transformation(form):
    args = torch.randn(5, 9), torch.randn(5, 9)
    reference = partial(module.geglu_reference, approximate=form)
    under_transforms(partial(triton, form=form), reference, args, 1e-6)


def test_a_wrong_backward_shows():
    backward_is_honoured(module, "_transposed", triton, (torch.randn(4), torch.ones(4)))


def test_equal_inputs_give_equal_bits():
    args = torch.randn(3, 1030), torch.randn(3, 1030)
    first, second = (torch.func.vjp(triton, *args) for _ in range(2))
    same([first[0], *first[1](args[0])], [second[0], *second[1](args[0])])


@FORMS
def test_reference_gradients(form):
    args = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in "gu"]
    reference = partial(module.geglu_reference, approximate=form)
    assert torch.autograd.gradcheck(reference, args)


def test_a_second_derivative_is_an_error():
    x = torch.ones(2)
    first = torch.func.grad(lambda g: triton(g, x).sum())
    with pytest.raises(RuntimeError, match="a first derivative and no second"):
        torch.func.grad(lambda g: first(g).sum())(x)


X = torch.ones(2, 3)
BAD = [
    ((X, X[0]), ValueError, r"up has shape \(3,\), expected \(2, 3\)"),
    ((X, X.half()), TypeError, r"up is torch.float16, .* use up.to\(gate.dtype\)"),
    ((X.long(), X), TypeError, r"gate is torch.int64, .* use gate.float\(\)"),
    ((X, X.to("meta")), ValueError, "tensors on cpu, meta, expected one device"),
    ((X, X, "erf"), ValueError, "approximate is 'erf', expected 'none' or 'tanh'"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=f"^geglu: {message}"):
        triton(*args)
