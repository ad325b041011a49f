# SPDX-License-Identifier: Apache-2.0
"""SwiGLU: Triton against float64 and under every transformation."""

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
from zfunc.kernels import swiglu as module


def triton(gate, up):
    return module.swiglu(gate, up, kernel="triton")


def exactly(gate, up):
    return module.swiglu_reference(gate.double(), up.double())


@settings(max_examples=30)
@given(SHAPES, DTYPES, LAYOUTS, LAYOUTS)
def test_the_kernel_is_the_formula(shape, dtype, first, second):
    torch.manual_seed(0)
    gate, up = (laid(normal(shape, dtype), layout) for layout in (first, second))
    grad = laid(normal(shape, dtype, 1.0), first)
    out, pull = torch.func.vjp(triton, gate, up)
    exact, exact_pull = torch.func.vjp(exactly, gate.double(), up.double())
    assert out.dtype == dtype
    assert out.is_contiguous()
    # exp is off by 2 + |g| roundings, which its size outweighs: g * g * exp(-g) < 1.
    # With the sum, the quotient and the products it stays below 16 of them.
    room = 16 * wide_eps(dtype) + 32 * 2.0**-53  # and torch in float64 is off by 32
    size = gate.double().abs().clamp(min=1)
    within(out, exact, room * size * up.double().abs())
    grads, exact_grads = pull(grad), exact_pull(grad.double())
    within(grads[0], exact_grads[0], room * (grad.double() * up.double()).abs())
    within(grads[1], exact_grads[1], room * size * grad.double().abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_extremes(dtype):
    gate = torch.tensor(EXTREMES).to(dtype)
    out, pull = torch.func.vjp(triton, gate, torch.ones_like(gate))
    gate_grad, up_grad = pull(torch.ones_like(gate))
    limit = gate.clamp(min=0) - 100 * (gate == -100) * torch.exp(-gate.new_tensor(100))
    torch.testing.assert_close(out, limit, rtol=1e-3, atol=1e-40)
    same([up_grad], [out])
    slope = torch.where(gate == 0, 0.5, (gate > 0).to(dtype)).to(dtype)
    torch.testing.assert_close(gate_grad, slope, rtol=0, atol=1e-40)
    nan = triton(gate.new_tensor([torch.nan]), gate.new_ones(1))
    assert nan.isnan().all()


def test_every_transformation():
    args = torch.randn(5, 9), torch.randn(5, 9)
    under_transforms(triton, module.swiglu, args, 1e-6)


def test_a_wrong_backward_shows():
    backward_is_honoured(module, "_transposed", triton, (torch.randn(4), torch.ones(4)))


def test_equal_inputs_give_equal_bits():
    args = torch.randn(3, 1030), torch.randn(3, 1030)
    first, second = (torch.func.vjp(triton, *args) for _ in range(2))
    same([first[0], *first[1](args[0])], [second[0], *second[1](args[0])])


def test_reference_gradients():
    args = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in "gu"]
    assert torch.autograd.gradcheck(module.swiglu_reference, args)


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
    ((X, 1.0), TypeError, "up is float, expected a floating tensor"),
    ((X, X.to("meta")), ValueError, "tensors on cpu, meta, expected one device"),
    ((X.to_sparse(), X), TypeError, "gate has layout torch.sparse_coo"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=f"^swiglu: {message}"):
        triton(*args)


def test_a_kernel_that_is_not_there():
    with pytest.raises(ValueError, match="kernel is 'cuda', expected one of 'auto'"):
        module.swiglu(X, X, kernel="cuda")
