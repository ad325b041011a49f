# SPDX-License-Identifier: Apache-2.0
"""Norms against torch.nn, rotary positions against complex numbers, attention
against the written-out softmax and torch's own kernel."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zfunc.models import causal_attention, layer_norm, rms_norm, rope_tables, rotate


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# --- norms -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_are_those_of_torch_nn(dtype: torch.dtype):
    x, scale = randn(3, 5, 8, dtype=dtype), randn(8, seed=1, dtype=dtype)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(
        rms_norm(x, scale, 1e-5), F.rms_norm(x, (8,), scale, 1e-5), **tolerance
    )
    torch.testing.assert_close(
        layer_norm(x, scale, 1e-5),
        F.layer_norm(x, (8,), scale, None, 1e-5),
        **tolerance,
    )


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_statistics_are_fp32(norm, dtype: torch.dtype):
    # 300^2 overflows fp16; the result is the fp32 one, rounded once.
    x, scale = 300 * randn(4, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    exact = norm(x.float(), scale.float(), 1e-5)
    assert torch.equal(norm(x, scale, 1e-5), exact.to(dtype))


# --- rotary positions --------------------------------------------------------------


def test_rotation_is_multiplication_by_a_unit_complex_number():
    x = randn(2, 3, 7, 8)
    cos, sin = rope_tables(7, 8, 500.0, x)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = torch.arange(7.0).double()[:, None] * 500.0 ** -(torch.arange(4) / 4.0)
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, cos, sin), expected, rtol=0, atol=1e-6)
    exact = rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-14)


@given(m=st.integers(0, 40), n=st.integers(0, 40), shift=st.integers(0, 40))
def test_scores_depend_on_distance_only(m: int, n: int, shift: int):
    q, k = randn(1, 16, seed=1), randn(1, 16, seed=2)
    cos, sin = rope_tables(81, 16, 10_000.0, q)

    def score(i: int, j: int) -> Tensor:
        at = [rotate(x, cos[p : p + 1], sin[p : p + 1]) for x, p in ((q, i), (k, j))]
        return (at[0] * at[1]).sum()

    torch.testing.assert_close(score(m, n), score(m + shift, n + shift))


def test_bf16_rotation_is_rounded_once():
    x = randn(2, 4096, 16, dtype=torch.bfloat16)
    cos, sin = rope_tables(4096, 16, 10_000.0, x)
    assert cos.dtype == torch.float32
    wide = rotate(x.double(), *rope_tables(4096, 16, 10_000.0, x.double()))
    error = (rotate(x, cos, sin).double() - wide).abs().max().item()
    # Half a bf16 ulp of the largest value, and fp32 angles at position 4096.
    assert error <= 2.0**-8 * wide.abs().max().item()


# --- attention ---------------------------------------------------------------------


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def with_pullback(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out, pull = torch.func.vjp(causal_attention, q, k, v)
    return out, *pull(torch.cos(out), retain_graph=False, create_graph=False)


def laid_out(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same values with the dims in another order in memory."""
    return x.permute(order).contiguous().permute([order.index(d) for d in range(4)])


ORDERS = st.permutations(range(4)).map(tuple)


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (3, 3, 40, 9))),
    num_groups=st.integers(1, 3),
    orders=st.tuples(ORDERS, ORDERS, ORDERS),
)
def test_attention_is_softmax_attention(shape, num_groups: int, orders):
    # In every memory layout: the kernel reads garbage if the last dim is not dense.
    batch, heads, length, width = shape
    q = randn(batch, heads * num_groups, length, width)
    k, v = (randn(batch, heads, length, width, seed=s) for s in (1, 2))
    q, k, v = map(laid_out, (q, k, v), orders)
    out, *grads = with_pullback(q, k, v)
    expected, pull = torch.func.vjp(written_out, q, k, v)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for grad, want in zip(grads, pull(torch.cos(expected)), strict=True):
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_bitwise_the_stock_function(dtype: torch.dtype):
    q, k, v = (randn(2, h, 9, 8, seed=h, dtype=dtype) for h in (4, 2, 2))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    ours = causal_attention(q, k, v)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(ours, stock)
    grads = [
        torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (ours, stock)
    ]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 2), (None, 0, None)])
def test_attention_under_vmap_is_bitwise_a_loop(in_dims: tuple[int | None, ...]):
    # Warnings are errors here: torch's own fallback for this kernel warns.
    plain = [randn(2, h, 5, 8, seed=h) for h in (4, 2, 2)]
    mapped = [
        x if d is None else torch.stack([x * s for s in (1.0, 2.0, 3.0)], d)
        for x, d in zip(plain, in_dims, strict=True)
    ]
    ours = torch.vmap(with_pullback, in_dims)(*mapped)
    for index in range(3):
        one = [
            x if d is None else x.select(d, index)
            for x, d in zip(mapped, in_dims, strict=True)
        ]
        assert all(map(torch.equal, [x[index] for x in ours], with_pullback(*one)))


def test_attention_under_nested_vmap_and_vjp_of_vmap():
    q, k, v = (randn(3, 2, 2, h, 5, 8, seed=h) for h in (4, 2, 2))
    nested = torch.vmap(torch.vmap(with_pullback))(q, k, v)
    out, pull = torch.func.vjp(torch.vmap(torch.vmap(causal_attention)), q, k, v)
    outside = (out, *pull(torch.cos(out)))
    for i, j in itertools.product(range(3), range(2)):
        one = with_pullback(q[i, j], k[i, j], v[i, j])
        assert all(map(torch.equal, [x[i, j] for x in nested], one))
        assert all(map(torch.equal, [x[i, j] for x in outside], one))


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 4, 5, 8), (2, 3, 5, 8), (2, 3, 5, 8)),
        ((2, 4, 5, 8), (2, 2, 5, 8), (2, 4, 5, 8)),
        ((2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8)),
        ((2, 4, 0, 8), (2, 2, 0, 8), (2, 2, 0, 8)),
        ((4, 5, 8), (2, 5, 8), (2, 5, 8)),
    ],
)
def test_attention_shapes_are_checked(q, k, v):
    with pytest.raises(ValueError, match=r"causal_attention: got q .* expected q"):
        causal_attention(randn(*q), randn(*k), randn(*v))


def test_attention_pulls_back_an_expanded_cotangent():
    q, k, v = (randn(2, 2, 5, 4, seed=s) for s in range(3))
    ours, want = (
        torch.func.vjp(lambda *a, f=f: f(*a).sum(), q, k, v)[1](torch.ones(()).double())
        for f in (causal_attention, written_out)
    )
    for grad, expected in zip(ours, want, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-13)


def test_attention_off_the_cpu_is_the_stock_function():
    q, k = (torch.empty(2, heads, 5, 8, device="meta") for heads in (4, 2))
    assert causal_attention(q, k, k).shape == q.shape
    assert causal_attention(q, q, q).device.type == "meta"


def test_attention_second_derivative_is_refused():
    q, k, v = (randn(1, 2, 3, 4, seed=s).requires_grad_() for s in range(3))
    (grad,) = torch.autograd.grad(
        causal_attention(q, k, v).square().sum(), q, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative on CPU"):
        grad.sum().backward()


def test_unused_attention_output_has_zero_gradient():
    q, k, v = (randn(1, 2, 3, 4, seed=s) for s in range(3))
    _, pull = torch.func.vjp(lambda q: causal_attention(q, k, v) * 0.0 + q, q)
    torch.testing.assert_close(pull(torch.ones_like(q))[0], torch.ones_like(q))
