# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: Triton is the reference bit for bit, from any strides."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.kernels.checks import backward_is_honoured, same, under_transforms
from tests.kernels.elementwise import laid, normal
from zfunc.kernels import rope as module
from zfunc.models.layers import rotate

LEADING = st.sampled_from([(), (1,), (0,), (3,), (2, 3), (2, 1, 3), (2, 3, 1, 2, 2)])
LAYOUTS = st.sampled_from(["contiguous", "heads", "stepped", "transposed", "sliced"])
TABLES = st.sampled_from(["shared", "per sample", "one position", "stepped"])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


def triton(x, cos, sin):
    return module.rope(x, cos, sin, kernel="triton")


def tables(shape, dtype=torch.float32):
    angle = torch.randn(shape, dtype=dtype)
    return angle.cos(), angle.sin()


def placed(x, layout):
    """As projections leave heads (``[B, T, H, K]`` as ``[B, H, T, K]``), or cut out."""
    if layout == "heads" and x.dim() > 2:
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "scattered":  # no two dims can be stepped through as one
        room = x.new_zeros([size + 1 for size in x.shape])
        return room[tuple(slice(size) for size in x.shape)].copy_(x)
    if layout == "sliced":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return laid(x, layout)


def equal(got, expected):
    """Bit for bit, but for a unit in the last place where bfloat16 is truncated."""
    assert got.dtype == expected.dtype
    if got.dtype == torch.bfloat16:
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-30)
    else:
        assert torch.equal(got, expected)


@settings(max_examples=30)
@given(
    LEADING,
    st.sampled_from([0, 1, 2, 5, 17]),
    st.sampled_from([1, 2, 3, 8, 16]),
    st.sampled_from([0, 0, 1, 5, 48]),
    DTYPES,
    LAYOUTS,
    TABLES,
)
@example((2, 2, 2, 2, 2), 2, 1, 1, torch.float32, "scattered", "shared")
@example((2,), 3, 129, 0, torch.float32, "contiguous", "shared")
@example((2,), 3, 2, 300, torch.float32, "heads", "shared")
def test_the_kernel_is_the_reference(lead, t, half, rest, dtype, layout, table):
    torch.manual_seed(0)
    x = placed(normal((*lead, t, 2 * half + rest), dtype), layout)
    shape = {
        "shared": (t, half),
        "stepped": (t, half),
        "per sample": (*lead[:1], *(1 for _ in lead[1:]), t, half),
        "one position": (1, half),
    }[table]
    cos, sin = tables(shape, torch.promote_types(dtype, torch.float32))
    if table == "stepped":
        cos = laid(cos, "stepped")
    out, pull = torch.func.vjp(lambda x: triton(x, cos, sin), x)
    expected, expected_pull = torch.func.vjp(
        lambda x: module.rope_reference(x, cos, sin), x
    )
    equal(out, expected)
    grad = placed(normal(x.shape, dtype), layout)
    equal(pull(grad)[0], expected_pull(grad)[0])


def test_the_models_turn_by_it():
    x = torch.randn(2, 3, 5, 8).bfloat16()
    cos, sin = tables((5, 4))
    a, b = x.float().chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).bfloat16()
    same([module.rope(x, cos, sin), rotate(x, cos, sin)], [turned] * 2)


def test_results_lie_in_memory_as_the_heads_do():
    x = torch.randn(2, 5, 3, 8).transpose(1, 2)
    out, pull = torch.func.vjp(lambda x: triton(x, *tables((5, 4))), x)
    assert out.stride() == x.stride()
    assert pull(x)[0].stride() == x.stride()
    assert triton(x[..., ::2], *tables((5, 2))).stride() == (60, 4, 12, 1)


def test_every_transformation():
    cos, sin = tables((5, 4))
    under_transforms(
        lambda x: triton(x, cos, sin),
        lambda x: module.rope_reference(x, cos, sin),
        (torch.randn(3, 5, 8),),
        1e-6,
    )


@pytest.mark.parametrize("dims", [(0, None, None), (None, 0, 1), (2, 0, None)])
def test_a_table_for_each_element_of_a_map(dims):
    x, (cos, sin) = torch.randn(2, 5, 8), tables((5, 4))
    several = [
        t if dim is None else torch.stack([t, t.flip(0)], dim)
        for t, dim in zip((x, cos, sin), dims, strict=True)
    ]
    got = torch.func.vmap(triton, in_dims=dims)(*several)
    expected = torch.func.vmap(module.rope_reference, in_dims=dims)(*several)
    same([got], [expected])


def test_the_second_derivative_of_a_linear_map():
    x, (cos, sin) = torch.randn(5, 8), tables((5, 4))

    def energy(f):
        return lambda x: f(x, cos, sin).pow(3).sum()

    got, expected = (
        torch.func.jacrev(torch.func.grad(energy(f)))(x)
        for f in (triton, module.rope_reference)
    )
    torch.testing.assert_close(got, expected)


def test_a_wrong_backward_shows():
    cos, sin = tables((2, 2))
    backward_is_honoured(
        module, "_transposed", lambda x: triton(x, cos, sin), (torch.randn(2, 4),)
    )


def test_reference_gradients():
    args = [torch.randn(3, 6, dtype=torch.float64), *tables((3, 2), torch.float64)]
    args = [x.requires_grad_() for x in args]
    assert torch.autograd.gradcheck(module.rope_reference, args)


@pytest.mark.parametrize("where", [(0, 1), 1, 2])
def test_tables_have_no_gradient(where):
    args = torch.randn(5, 8), *tables((5, 4))
    with pytest.raises(RuntimeError, match=r"no gradient for cos and sin; use cos.det"):
        torch.func.grad(lambda *xs: triton(*xs).sum(), where)(*args)
    torch.func.grad(lambda *xs: module.rope(*xs).sum(), where)(*args)


def test_more_dims_than_the_kernel_steps_through_lie_as_tracing_says():
    x = torch.randn(3, 3, 3, 3, 3, 6)[:2, :2, :2, :2].permute(3, 1, 0, 2, 4, 5)
    cos, sin = tables((3, 3))
    same([triton(x, cos, sin)], [module.rope(x, cos, sin, kernel="reference")])
    args = x, cos, sin, False
    torch.library.opcheck(module.rope_op, args, test_utils="test_faketensor")


X, (COS, SIN) = torch.ones(2, 5, 8), tables((5, 4))
BAD = [
    ((X.int(), COS, SIN), TypeError, "x is torch.int32, expected a floating tensor"),
    ((X, COS.half(), SIN), TypeError, r"cos is torch.float16, .* use cos.float\(\)"),
    ((X, COS, SIN.double()), TypeError, r"sin is torch.float64, .* use sin.to\(cos"),
    ((X, COS, SIN[:1]), ValueError, r"sin has shape \(1, 4\), expected \(5, 4\)"),
    ((X[..., :6], COS, SIN), ValueError, "cos has shape .* 1 <= R <= K / 2"),
    ((X, COS[:, :0], SIN[:, :0]), ValueError, "cos has shape .* 1 <= R <= K / 2"),
    ((X[0, 0, 0], COS, SIN), ValueError, "cos has shape .* 1 <= R <= K / 2"),
    ((X, COS[0, 0], SIN[0, 0]), ValueError, "cos has shape .* 1 <= R <= K / 2"),
    ((X[:, :3], COS, SIN), ValueError, r"expected one that .* \(2, 3, 4\); cut .*\[:T"),
    ((X[0], COS[None], SIN[None]), ValueError, "expected one that broadcasts to"),
    ((X, COS.to("meta"), SIN), ValueError, "tensors on cpu, meta, expected one"),
]


@pytest.mark.parametrize(("args", "error", "message"), BAD)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=f"^rope: .*{message}"):
        triton(*args)
