# SPDX-License-Identifier: Apache-2.0
"""GELU of a sum with a bias: Triton against float64, and under transformations."""

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.checks import backward_is_honoured, same, under_transforms
from tests.kernels.elementwise import (
    DTYPES,
    EXTREMES,
    LAYOUTS,
    laid,
    normal,
    wide_eps,
    within,
)
from zfunc.kernels import bias_gelu as module

FORMS = pytest.mark.parametrize("form", ["none", "tanh"])
SHAPES = st.sampled_from(
    [(0,), (1,), (3, 0), (0, 4), (7, 3), (129, 17), (2, 3, 5), (5, 127), (3, 1025)]
)


def triton(x, bias, form="none"):
    return module.bias_gelu(x, bias, approximate=form, kernel="triton")


def exactly(x, bias, form):
    return module.bias_gelu_reference(x.double(), bias.double(), approximate=form)


@FORMS
@settings(max_examples=20)
@given(SHAPES, DTYPES, LAYOUTS, LAYOUTS)
@example((600, 2), torch.float32, "contiguous", "contiguous")  # several parts
def test_the_kernel_is_the_formula(form, shape, dtype, first, second):
    torch.manual_seed(0)
    x, grad = (laid(normal(shape, dtype), layout) for layout in (first, second))
    bias = laid(normal(shape[-1:], dtype), second)
    out, pull = torch.func.vjp(partial(triton, form=form), x, bias)
    exact, exact_pull = torch.func.vjp(
        partial(exactly, form=form), x.double(), bias.double()
    )
    assert out.dtype == dtype
    assert out.is_contiguous()
    # The sum is rounded once more than in GEGLU, and every slope of it is below 1.2.
    room = 16 * wide_eps(dtype) + 32 * 2.0**-53  # and torch in float64 is off by 32
    size = (x.double() + bias.double()).abs().clamp(min=1)
    within(out, exact, room * size)
    (x_grad, bias_grad), expected = pull(grad), exact_pull(grad.double())
    room = room * size * grad.double().abs()
    within(x_grad, expected[0], room)
    # Terms are added one by one along rows: a rounding of the whole sum for each.
    rows = room.reshape(-1, shape[-1]).shape[0] if x.numel() else 0
    total = (room * (1 + rows / 8)).reshape(-1, max(1, shape[-1])).sum(0)
    within(bias_grad, expected[1], total[: shape[-1]])


@FORMS
def test_extremes(form):
    x = torch.tensor(EXTREMES)[:, None]
    out, pull = torch.func.vjp(partial(triton, form=form), x, torch.zeros(1))
    same([out], [x.clamp(min=0)])
    slope = torch.where(x == 0, 0.5, (x > 0).float())
    same(pull(torch.ones_like(x)), [slope, slope.sum(0)])


@FORMS
def test_every_transformation(form):
    args = torch.randn(5, 9), torch.randn(9)
    reference = partial(module.bias_gelu_reference, approximate=form)
    under_transforms(partial(triton, form=form), reference, args, 2e-6)


def test_maps_in_maps():
    x, bias = torch.randn(2, 3, 4, 5), torch.randn(3, 5)
    mapped = [
        torch.func.vmap(torch.func.vmap(f), in_dims=(0, None))(x, bias)
        for f in (triton, module.bias_gelu_reference)
    ]
    torch.testing.assert_close(*mapped)


def test_a_wrong_backward_shows():
    args = torch.randn(3, 4), torch.ones(4)
    backward_is_honoured(module, "_transposed", triton, args)


def test_equal_inputs_give_equal_bits():
    args = torch.randn(70, 20), torch.randn(20)
    first, second = (torch.func.vjp(triton, *args) for _ in range(2))
    same([first[0], *first[1](args[0])], [second[0], *second[1](args[0])])


@FORMS
def test_reference_gradients(form):
    shapes = (3, 2), (2,)
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    reference = partial(module.bias_gelu_reference, approximate=form)
    assert torch.autograd.gradcheck(reference, args)


def test_a_second_derivative_is_an_error():
    x = torch.ones(2)
    first = torch.func.grad(lambda g: triton(g, x).sum())
    with pytest.raises(RuntimeError, match="a first derivative and no second"):
        torch.func.grad(lambda g: first(g).sum())(x)


X = torch.ones(2, 3)
BAD = [
    ((X, X), ValueError, r"bias has shape \(2, 3\), expected \(3,\)"),
    ((X[0, 0], X[0]), ValueError, r"x has shape \(\), expected \[..., D\]"),
    ((X, X[0].half()), TypeError, r"bias is torch.float16, .* use bias.to\(x.dtype\)"),
    ((X.long(), X[0]), TypeError, r"x is torch.int64, .* use x.float\(\)"),
    ((X, X[0].to("meta")), ValueError, "tensors on cpu, meta, expected one device"),
    ((X, X[0], "erf"), ValueError, "approximate is 'erf', expected 'none' or 'tanh'"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=f"^bias_gelu: {message}"):
        triton(*args)
