# SPDX-License-Identifier: Apache-2.0
"""Softmax: Triton against float64, with masks, and under every transformation."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.checks import EPS, backward_is_honoured, close, under_transforms
from zfunc.kernels import softmax as module

SHAPES = st.sampled_from(
    [(0,), (1,), (3, 0), (0, 5), (7, 3), (2, 127), (5, 128), (3, 1025), (2, 3, 9, 8)]
)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
# The products and the exponential, a sum by halving of the row, and a division.
SINGLE = 16 * EPS[torch.float32]

HUGE = torch.empty(1, 2**31, dtype=torch.bfloat16, device="meta")


def triton(x, **options):
    return module.softmax(x, kernel="triton", **options)


def exact(x, scale=1.0, mask=None, causal=False):
    """The definition, a float64 row at a time."""
    scores = x.double() * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -math.inf)
    elif mask is not None:
        scores = scores + mask.double()
    if causal:
        T, S = x.shape[-2:]
        late = torch.arange(S) > torch.arange(T)[:, None] + S - T
        scores = torch.where(late, -math.inf, scores)
    covered = scores.amax(-1, keepdim=True) == -math.inf if scores.numel() else None
    y = torch.softmax(scores, -1)
    return y if covered is None else torch.where(covered, 0.0, y)


def random_mask(kind, shape, drop):
    """A mask of size 1 in the dims that ``drop`` names."""
    shape = [1 if i in drop else n for i, n in enumerate(shape)]
    if kind == "boolean":
        return torch.rand(shape) < 0.7
    return torch.randn(shape).masked_fill(torch.rand(shape) < 0.2, -math.inf)


def bound(dtype):
    # The interpreter truncates where the GPU rounds.
    return (16 if dtype == torch.float64 else 0) * EPS[dtype] + (
        SINGLE + 2 * EPS[dtype] if dtype != torch.float64 else 0
    )


@given(
    SHAPES,
    DTYPES,
    st.sampled_from([1.0, 0.125, -2.0]),
    st.sampled_from(["none", "boolean", "additive"]),
    st.sets(st.integers(0, 3)),
    st.booleans(),
    st.booleans(),
)
@example((2, 40000), torch.bfloat16, 0.1, "additive", {0}, True, False)
@example((2, 33000), torch.float32, 0.1, "boolean", set(), False, True)
@example((2, 17000), torch.float32, 3.0, "additive", {1}, True, False)
@example((70, 3), torch.float32, 0.1, "boolean", set(), True, False)
@settings(max_examples=40)
def test_the_kernel_is_the_formula(shape, dtype, scale, kind, drop, causal, turned):
    torch.manual_seed(0)
    x = torch.randn(shape).mul(3).to(dtype)
    if turned:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    options = {
        "scale": scale,
        "mask": None if kind == "none" else random_mask(kind, shape, drop),
        "causal": causal and len(shape) > 1,
    }
    grad = torch.randn(shape).to(dtype)
    x64 = x.double().clone().requires_grad_()
    y64 = exact(x64, **options)
    for kernel in ("triton", "reference"):
        y, pull = torch.func.vjp(
            lambda x, kernel=kernel: module.softmax(x, kernel=kernel, **options), x
        )
        assert y.dtype == dtype
        close(y, y64, bound(dtype))
        x_grad = y64 * (grad - (grad * y64).sum(-1, keepdim=True)) * scale
        # The output of the dtype enters twice, next to elements of the size of 4.
        close(pull(grad)[0], x_grad, 16 * (bound(dtype) + EPS[dtype]))


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_a_row_without_columns_is_zero_and_so_is_its_gradient(kernel):
    x = torch.randn(3, 2)
    x[2] = -math.inf
    mask = torch.tensor([[True, True], [False, False], [True, True]])

    def f(x, **options):
        return module.softmax(x, kernel=kernel, **options)

    y, pull = torch.func.vjp(lambda x: f(x, mask=mask), x)
    assert y[0].sum() == 1
    assert not y[1:].any()
    (x_grad,) = pull(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    assert x_grad[0].any()
    assert not x_grad[1:].any()
    # Without a mask it is as in torch.
    assert f(x)[2].isnan().all()
    # Three rows and two columns: the first row sees nothing.
    assert not f(torch.randn(3, 2), causal=True)[0].any()


def test_what_is_masked_is_not_looked_at():
    x = torch.full((4, 64), 2.0)
    x[:2, 63] = math.nan
    y = triton(x, causal=True)
    assert not y[:2].isnan().any()
    (x_grad,) = torch.func.vjp(lambda z: triton(z, causal=True), x)[1](x)
    assert not x_grad[:2].isnan().any()
    assert triton(torch.tensor([1.0, math.nan, 2.0])).isnan().all()


@pytest.mark.parametrize("shape", [(1,), (4, 1, 1, 6), (5, 6), (1, 3, 5, 1)])
def test_the_gradient_of_an_added_mask(shape):
    args = torch.randn(4, 3, 5, 6), torch.randn(shape)

    def f(kernel):
        return lambda x, m: module.softmax(x, scale=0.3, mask=m, kernel=kernel)

    under_transforms(f("triton"), f("reference"), args, 1e-6)


def test_every_transformation():
    for options in ({}, {"causal": True, "scale": 2.0}):
        under_transforms(
            lambda x, options=options: triton(x, **options),
            lambda x, options=options: module.softmax_reference(x, **options),
            (torch.randn(5, 9),),
            1e-6,
        )


def test_a_mask_per_sample():
    x, masks = torch.randn(5, 6), torch.rand(3, 6) < 0.6
    mapped = torch.func.vmap(lambda x, m: triton(x, mask=m), (None, 0))(x, masks)
    assert torch.equal(mapped, torch.stack([triton(x, mask=m) for m in masks]))


def test_a_mask_of_many_alternating_dims():
    x = torch.randn(2, 3, 2, 3, 2, 4)
    mask = torch.rand(2, 1, 2, 1, 2, 4) < 0.6
    close(triton(x, mask=mask), exact(x, mask=mask), SINGLE)


def test_a_wrong_backward_shows():
    backward_is_honoured(
        module, "_transposed", lambda x: triton(x).square(), (torch.randn(3, 4),)
    )


@pytest.mark.parametrize("causal", [True, False])
def test_reference_gradients(causal):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    m = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, m: module.softmax_reference(x, scale=0.4, mask=m, causal=causal),
        (x, m),
    )


def test_the_same_bits_twice():
    x = torch.randn(3, 33000)
    assert torch.equal(triton(x), triton(x))


def test_a_second_derivative_is_an_error():
    first = torch.func.grad(lambda x: triton(x).square().sum())
    with pytest.raises(RuntimeError, match="a first derivative and no second"):
        torch.func.grad(lambda x: first(x).sum())(torch.randn(3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: module.softmax(x.int()), TypeError, r"use x\.float\(\)"),
        (lambda x: module.softmax(x[0, 0]), ValueError, r"no dim.*x\[None\]"),
        (lambda x: module.softmax(x[0], causal=True), ValueError, r"\(4,\).*\[T, S\]"),
        (lambda x: module.softmax(x, mask=1.0), TypeError, "mask is float"),
        (lambda x: module.softmax(x, scale=x[0, 0]), TypeError, "scale is Tensor"),
        (lambda x: module.softmax(HUGE), ValueError, "x has 2147483648 columns"),
        (lambda x: module.softmax(x, mask=x.int()), TypeError, "mask is torch.int32"),
        (lambda x: module.softmax(x, mask=x[:, :3]), ValueError, r"\(3, 3\).*\(3, 4\)"),
        (lambda x: module.softmax(x, mask=x[None]), ValueError, "broadcasts to"),
        (lambda x: module.softmax(x, kernel="cuda"), ValueError, 'kernel="auto"'),
        (lambda x: module.softmax(x, mask=x.to("meta")), ValueError, "one device"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4))
