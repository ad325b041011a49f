# SPDX-License-Identifier: Apache-2.0
"""Dropout in one pass: the mask of ``zfunc.core.random``, and what hangs on it."""

from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.checks import backward_is_honoured, same, under_transforms
from tests.kernels.elementwise import DTYPES, LAYOUTS, laid, normal, wide_eps, within
from zfunc.core import random
from zfunc.kernels import bias_dropout_residual as module
from zfunc.kernels.counter_random import threshold

SHAPES = st.sampled_from(
    [(0,), (1,), (3, 0), (0, 4), (7, 3), (129, 17), (2, 3, 5), (5, 127), (3, 1025)]
)
RATES = st.sampled_from([0.0, 0.1, 0.5, 0.7, 1 - 2**-24, 2.0**-30])


def triton(x, bias, residual, key, rate):
    return module.bias_dropout_residual(x, bias, residual, key, rate, kernel="triton")


def keys_of(shape, dims):
    return random.fold_in(torch.tensor(7), torch.arange(2**20))[: shape[:dims].numel()]


@settings(max_examples=30)
@given(SHAPES, st.integers(0, 3), RATES, st.sampled_from([0, -1, 2**63 - 1, -(2**63)]))
@example((600, 2), 1, 0.3, 5)
def test_the_mask_is_that_of_the_library(shape, dims, rate, seed):
    shape = torch.Size(shape)
    lead = shape[: min(dims, len(shape))]
    key = random.fold_in(torch.tensor(seed), torch.arange(lead.numel())).reshape(lead)
    x, zeros = torch.rand(shape) + 0.5, torch.zeros(shape)
    expected = random.dropout(key, x, rate)
    out, pull = torch.func.vjp(lambda x: triton(x, None, zeros, key, rate), x)
    same([out], [expected])
    same([module.bias_dropout_residual(x, None, zeros, key, rate)], [expected])
    same(pull(x), [expected])


@settings(max_examples=40)
@given(SHAPES, DTYPES, LAYOUTS, LAYOUTS, RATES, st.booleans())
@example((600, 2), torch.float32, "contiguous", "contiguous", 0.3, True)
@example((600, 2), torch.bfloat16, "contiguous", "transposed", 0.0, True)
def test_the_kernel_is_the_formula(shape, dtype, first, second, rate, with_bias):
    torch.manual_seed(0)
    x, residual = laid(normal(shape, dtype), first), laid(normal(shape, dtype), second)
    bias = laid(normal(shape[-1:], dtype), second) if with_bias else None
    rate = min(rate, 0.7)  # and no overflow in half precision
    args = [x, residual] if bias is None else [x, residual, bias]

    def call(f, x, residual, bias=None):
        return f(x, bias, residual, torch.tensor(3), rate)

    out, pull = torch.func.vjp(partial(call, triton), *args)
    reference = module.bias_dropout_residual_reference
    exact, exact_pull = torch.func.vjp(
        partial(call, reference), *(x.double() for x in args)
    )
    assert out.dtype == dtype
    assert out.is_contiguous()
    if dtype in (torch.float32, torch.float64):
        same([out], [call(reference, *args)])
    # Two sums and a quotient, each rounded once, of what is kept.
    eps = wide_eps(dtype)
    terms = x.double().abs() + (0 if bias is None else bias.double().abs())
    within(out, exact, 3 * eps * (terms / (1 - rate) + residual.double().abs()))
    grad = laid(normal(shape, dtype), second)
    grads, expected = pull(grad), exact_pull(grad.double())
    within(grads[0], expected[0], 2 * eps * expected[0].abs())
    same([grads[1]], [grad])
    if with_bias:
        # Terms are added one by one along rows: a rounding of the whole sum for each.
        rows = x.numel() // max(1, shape[-1])
        total = expected[0].abs().reshape(rows, shape[-1]).sum(0)
        within(grads[2], expected[2], (3 + rows / 8) * eps * total)


@given(st.floats(0, 1, exclude_max=True), st.integers(-2, 2))
def test_the_threshold_is_torchs_comparison(rate, step):
    number = min(max(threshold(rate) + step, 0), 2**24 - 1)
    uniform = torch.tensor([number]).float() * 2.0**-24
    assert bool(uniform >= rate) == (number >= threshold(rate))


def test_a_number_that_is_the_rate_is_kept():
    key, x = torch.tensor(11), torch.ones(8)
    rate = random.uniform(key, (8,))[3].item()
    same([triton(x, None, 0 * x, key, rate)], [random.dropout(key, x, rate)])


def mapped(f):
    key = torch.tensor(5)
    return lambda x, bias, residual: f(x, bias, residual, key, 0.4)


def test_every_transformation():
    args = torch.randn(5, 9), torch.randn(9), torch.randn(5, 9)
    reference = mapped(module.bias_dropout_residual_reference)
    under_transforms(mapped(triton), reference, args, 2e-6)


def test_every_transformation_without_a_rate():
    args = torch.randn(5, 9), torch.randn(9), torch.randn(5, 9)
    under_transforms(
        lambda x, b, r: triton(x, b, r, None, 0.0),
        lambda x, b, r: module.bias_dropout_residual_reference(x, b, r, None, 0.0),
        args,
        2e-6,
    )


@pytest.mark.parametrize("dims", [0, 1, 2])
def test_keys_in_maps(dims):
    x = torch.randn(2, 4, 3, 5)
    key = keys_of(x.shape, dims + 1).reshape(x.shape[: dims + 1])
    got, expected = (
        torch.func.vmap(lambda x, k, f=f: f(x, None, x, k, 0.5))(x, key)
        for f in (triton, module.bias_dropout_residual_reference)
    )
    same([got], [expected])


def test_a_wrong_backward_shows():
    args = torch.randn(3, 4), torch.randn(4)

    def call(x, bias):
        return triton(x, bias, x.detach(), torch.tensor(1), 0.1)

    backward_is_honoured(module, "_transposed", call, args)


def test_nothing_but_the_keys_is_saved():
    saved = []
    x = torch.randn(4, 6, requires_grad=True)
    key = torch.arange(4)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        triton(x, torch.ones(6), x, key, 0.5)
    assert [tuple(each.shape) for each in saved] == [(1, 4)]


def test_equal_inputs_give_equal_bits():
    args = torch.randn(70, 20), torch.randn(20), torch.randn(70, 20)
    first, second = (torch.func.vjp(mapped(triton), *args) for _ in range(2))
    same([first[0], *first[1](args[0])], [second[0], *second[1](args[0])])


def test_reference_gradients():
    shapes = (3, 2), (2,), (3, 2)
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    reference = mapped(module.bias_dropout_residual_reference)
    assert torch.autograd.gradcheck(reference, args)


def test_a_second_derivative_is_an_error():
    x = torch.ones(2)
    key = torch.tensor(1)
    first = torch.func.grad(lambda x: triton(x, x, x, key, 0.1).square().sum())
    with pytest.raises(RuntimeError, match="a first derivative and no second"):
        torch.func.grad(lambda x: first(x).sum())(x)


X, KEY = torch.ones(2, 3), torch.tensor(0)
BAD = [
    ((X.int(), None, X, KEY, 0.1), TypeError, "x is torch.int32, expected a float"),
    ((X, None, X[0], KEY, 0.1), ValueError, r"residual has shape \(3,\), expected"),
    ((X, None, X.half(), KEY, 0.1), TypeError, "residual is torch.float16, expected"),
    ((X, X, X, KEY, 0.1), ValueError, r"bias has shape \(2, 3\), expected \(3,\)"),
    ((X, X[0].half(), X, KEY, 0.1), TypeError, "bias is torch.float16, expected"),
    ((X[0, 0], X[0, 0], X[0, 0], KEY, 0.1), ValueError, r"x has shape \(\), expected"),
    ((X, None, X, KEY.int(), 0.1), TypeError, "key is torch.int32, expected an int64"),
    ((X, None, X, 3, 0.1), TypeError, "key is int, expected an int64 tensor"),
    ((X, None, X, None, 0.1), ValueError, "key is None and rate 0.1, expected an"),
    ((X, None, X, torch.arange(3), 0.1), ValueError, r"key has shape \(3,\), expected"),
    ((X, None, X, KEY, 1.0), ValueError, r"rate is 1.0, expected one in \[0, 1\)"),
    ((X, None, X, KEY, float("nan")), ValueError, r"rate is nan, expected one in"),
    ((X, None, X, KEY, torch.tensor(0.1)), TypeError, "rate is Tensor, expected a num"),
    ((X, None, X, KEY.to("meta"), 0.1), ValueError, "tensors on cpu, meta, expected"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=f"^bias_dropout_residual: {message}"):
        triton(*args)
