# SPDX-License-Identifier: Apache-2.0
"""The norm of a list and its finite check, against float64 and transformed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.checks import EPS, backward_is_honoured, same, under_transforms
from zfunc.kernels import global_norm as module
from zfunc.kernels.global_norm import global_norm, square_sums

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [
    (),
    (0,),
    (1,),
    (127,),
    (1024,),
    (2047,),
    (2049,),
    (3, 5, 7),
    (70, 61),
    (5000,),
]
# 64 blocks and the rest in each lane, 11 halvings of the lanes, the result's rounding.
BOUND = 80 * EPS[torch.float32]
# torch: 128 vectors of 8 in each row, 3 halvings.
LOOSE = 150 * EPS[torch.float32]


@st.composite
def lists(draw, dtypes=DTYPES):
    tensors = []
    for shape in draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5)):
        x = torch.randn(shape).mul(draw(st.sampled_from([1.0, 1e-3, 50.0])))
        x = x.to(draw(st.sampled_from(dtypes)))
        tensors.append(
            draw(
                st.sampled_from(
                    [x, x.mT if x.dim() > 1 else x.flip(0)] if x.dim() else [x]
                )
            )
        )
    return tensors


def exact_sums(tensors):
    return torch.stack([x.double().square().sum() for x in tensors])


def within(got, exact, bound):
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= bound * exact).all(), (got, exact)


@settings(max_examples=25)
@given(lists())
def test_sums_and_norm_are_those_of_float64(tensors):
    exact = exact_sums(tensors)
    wide = (
        torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32
    )
    for kernel, bound in (("triton", BOUND), ("reference", LOOSE)):
        sums, finite = square_sums(tensors, kernel=kernel)
        within(sums, exact, bound)
        assert sums.dtype == wide
        norm, also = global_norm(tensors, kernel=kernel)
        within(norm, exact.sum().sqrt(), bound)
        assert norm.dtype == wide
        assert finite.shape == also.shape == ()
        assert finite.item() is also.item() is True


def test_float64_alone_is_as_exact_as_that():
    x = [torch.randn(3000, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    for kernel in ("triton", "reference"):
        within(square_sums(x, kernel=kernel).sums, exact_sums(x), 200 * 2.0**-53)
        norm = global_norm(x, kernel=kernel).norm
        within(norm, exact_sums(x).sum().sqrt(), 200 * 2.0**-53)


@settings(max_examples=20)
@given(
    lists([torch.float32, torch.bfloat16]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(0, 10**6),
)
def test_one_element_that_is_not_finite_shows_wherever_it_is(tensors, value, at):
    tensors = [x.contiguous() for x in tensors if x.numel()] or [torch.ones(1)]
    x = tensors[at % len(tensors)].view(-1)
    x[at % x.numel()] = value
    expected = exact_sums(tensors)
    for kernel in ("triton", "reference"):
        norm, finite = global_norm(tensors, kernel=kernel)
        sums, also = square_sums(tensors, kernel=kernel)
        assert not finite
        assert not also
        assert torch.equal(norm.isnan(), expected.sum().isnan())
        assert torch.equal(sums.isinf(), expected.isinf())
        assert torch.equal(sums.isnan(), expected.isnan())


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_finite_is_about_the_elements_and_not_about_their_squares(kernel):
    large = [torch.full((3,), 1e30), torch.ones(5)]
    assert global_norm(large, kernel=kernel) == (math.inf, True)
    sums, finite = square_sums(large, kernel=kernel)
    assert sums.tolist() == [math.inf, 5.0]
    assert finite
    # Squares of each chunk fit; their sum does not, and the norm is right all the same.
    spread = [torch.full((100,), 1.5e18), *[torch.full((1,), 1.5e18)] * 200]
    norm, finite = global_norm(spread, kernel=kernel)
    within(norm.double(), torch.tensor(1.5e18 * 300**0.5).double(), BOUND)
    assert finite
    most = [torch.full((9,), torch.finfo(torch.float64).max, dtype=torch.float64)]
    assert global_norm(most, kernel=kernel) == (math.inf, True)


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_nothing_has_norm_zero(kernel):
    assert global_norm([], kernel=kernel) == (0.0, True)
    assert square_sums((), kernel=kernel).sums.shape == (0,)
    empty = [torch.ones(0), torch.ones(2, 0, dtype=torch.float16)]
    assert global_norm(empty, kernel=kernel) == (0.0, True)
    assert square_sums(empty, kernel=kernel).sums.tolist() == [0.0, 0.0]
    assert square_sums(empty, kernel=kernel).finite
    zeros = [torch.zeros(3)]
    gradient = torch.func.grad(lambda x: global_norm([x], kernel=kernel).norm)(*zeros)
    assert gradient.tolist() == [0.0, 0.0, 0.0]


def test_the_same_bits_every_time_whatever_is_beside_in_other_dtypes():
    tensors = [torch.randn(9001), torch.randn(77, 33).mT, torch.randn(2048)]
    first = global_norm(tensors, kernel="triton").norm
    sums = square_sums(tensors, kernel="triton").sums
    for _ in range(3):
        assert torch.equal(global_norm(tensors, kernel="triton").norm, first)
        assert torch.equal(square_sums(tensors, kernel="triton").sums, sums)
    assert (
        torch.equal(first, sums.double().sum().sqrt().float())
        or abs(first / sums.double().sum().sqrt() - 1) < 2 * EPS[torch.float32]
    )
    halves = [torch.randn(5).half(), *tensors, torch.randn(3).half()]
    assert torch.equal(square_sums(halves, kernel="triton").sums[1:4], sums)


def test_unaligned_tensors():
    x = torch.randn(5001)
    for start in (1, 2, 3, 4):
        within(
            square_sums([x[start:], x[:-1]], kernel="triton").sums,
            exact_sums([x[start:], x[:-1]]),
            BOUND,
        )


def triton_norm(x, y):
    return global_norm([x, y], kernel="triton").norm.reshape(1)


def reference_norm(x, y):
    return global_norm([x, y], kernel="reference").norm.reshape(1)


def triton_sums(x, y):
    return square_sums([x, y], kernel="triton").sums


def reference_sums(x, y):
    return square_sums([x, y], kernel="reference").sums


def test_every_transformation():
    args = torch.randn(5, 3), torch.randn(7)
    under_transforms(triton_norm, reference_norm, args, 1e-5)
    under_transforms(triton_sums, reference_sums, args, 1e-5)


def test_a_wrong_backward_shows():
    args = torch.randn(5, 3), torch.randn(7)
    backward_is_honoured(module, "_scaled", triton_norm, args)
    backward_is_honoured(module, "_scaled", triton_sums, args)


def test_reference_gradients():
    args = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (3, 2)]
    for fn in (reference_norm, reference_sums, triton_norm, triton_sums):
        assert torch.autograd.gradcheck(fn, args)
        assert torch.autograd.gradgradcheck(fn, args)


def test_gradients_in_the_dtype_of_each_tensor():
    x, y = torch.randn(4).bfloat16(), torch.randn(3).double()
    grads = torch.func.grad(lambda x, y: triton_norm(x, y).sum(), (0, 1))(x, y)
    want = torch.func.grad(lambda x, y: reference_norm(x, y).sum(), (0, 1))(x, y)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float64]
    for got, expected in zip(grads, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_two_mapped_lists():
    xs, y = torch.randn(4, 6), torch.randn(3)
    mapped = torch.func.vmap(triton_norm, in_dims=(0, None))(xs, y)
    same(mapped, torch.stack([triton_norm(x, y) for x in xs]))


@pytest.mark.parametrize("fn", [global_norm, square_sums])
def test_bad_input(fn):
    name = fn.__name__
    with pytest.raises(TypeError, match=f"{name}: tensors is Tensor, expected a list"):
        fn(torch.ones(3))
    with pytest.raises(TypeError, match=rf"{name}: tensors\[1\] is torch.int64"):
        fn([torch.ones(1), torch.ones(1, dtype=torch.int64)])
    with pytest.raises(TypeError, match=rf"{name}: tensors\[0\] has layout"):
        fn([torch.ones(2, 2).to_sparse()])
    with pytest.raises(ValueError, match=f"{name}: kernel is 'cuda'"):
        fn([torch.ones(1)], kernel="cuda")
    with pytest.raises(ValueError, match=f"{name}: tensors on cpu, meta"):
        fn([torch.ones(1), torch.ones(1, device="meta")])
