# SPDX-License-Identifier: Apache-2.0
"""SwiGLU: Triton against float64 and under every transformation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels.checks import EPS, backward_is_honoured, close, under_transforms
from zfunc.kernels import swiglu as module

SIZES = st.sampled_from([(0,), (1,), (7, 3), (127,), (128, 8), (1025,), (3, 0, 2)])


def triton(gate, up):
    return module.swiglu(gate, up, kernel="triton")


@given(SIZES, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_the_kernel_is_the_formula(shape, dtype):
    gate, up = (torch.randn(shape).mul(3).to(dtype) for _ in range(2))
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    # Four roundings in float32, and one to the dtype (the interpreter truncates).
    close(triton(gate, up), exact, 4 * EPS[torch.float32] + 2 * EPS[dtype])


def test_every_transformation():
    args = torch.randn(5, 9), torch.randn(5, 9)
    under_transforms(triton, module.swiglu, args, 1e-6)


def test_a_wrong_backward_shows():
    backward_is_honoured(module, "_transposed", triton, (torch.randn(4), torch.ones(4)))


def test_reference_gradients():
    args = [torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in "gu"]
    assert torch.autograd.gradcheck(module.swiglu_reference, args)


def test_a_second_derivative_is_an_error():
    x = torch.ones(2)
    first = torch.func.grad(lambda g: triton(g, x).sum())
    with pytest.raises(RuntimeError, match="a first derivative and no second"):
        torch.func.grad(lambda g: first(g).sum())(x)
