# SPDX-License-Identifier: Apache-2.0
"""RMSNorm and LayerNorm: Triton against float64 and under every transformation."""

import math
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from tests.kernels.checks import EPS, backward_is_honoured, close, under_transforms
from zfunc.kernels import layer_norm as layer_module
from zfunc.kernels import norm_rows
from zfunc.kernels import rms_norm as rms_module
from zfunc.kernels.layer_norm import layer_norm, layer_norm_reference
from zfunc.kernels.rms_norm import rms_norm, rms_norm_reference

BOTH = pytest.mark.parametrize("fn", [rms_norm, layer_norm])
MODULES = {rms_norm: rms_module, layer_norm: layer_module}
SHAPES = st.sampled_from(
    [(0,), (1,), (0, 5), (5, 0), (1, 1), (7, 2), (127,), (2, 3, 64), (37, 9), (3, 257)]
)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
# Sizes that send rows of a few columns through the kernels for long ones, and several
# tiles of rows through one program.
SMALL = {
    "WARPS": 32,
    "FORWARD_TILE": 64,
    "FORWARD_COLUMNS": 64,
    "CHUNK": 64,
    "BACKWARD_TILE": 64,
    "BACKWARD_COLUMNS": 64,
    "SEGMENT": 32,
    "AHEAD_BYTES": 256,
    "SUM_ROWS": 2,
}


def small():
    patches = ExitStack()
    for name, value in SMALL.items():
        patches.enter_context(mock.patch.object(norm_rows, name, value))
    return patches


def drawn(fn, shape, dtype=torch.float32, scale_dtype=torch.float32):
    """x, residual, and the parameters: a scale and, for a layer norm, a bias."""
    params = [torch.randn(shape[-1]).to(scale_dtype) for _ in names(fn)]
    return torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), params


def names(fn):
    return ("scale",) if fn is rms_norm else ("scale", "bias")


def triton(fn, **options):
    return lambda *args: fn(*args, kernel="triton", **options)


def statistics(fn, x, eps):
    """Of float64 rows: the normalised, 1 / std, and how much the mean cancels."""
    mean = x.mean(-1, keepdim=True) if fn is layer_norm else 0.0
    rstd = torch.rsqrt((x - mean).square().mean(-1, keepdim=True) + eps)
    cancelled = x.abs().mean(-1, keepdim=True) * rstd if fn is layer_norm else 0.0
    return (x - mean) * rstd, rstd, 1.0 + cancelled


def within(got, expected, tolerance, dtype):
    """Element by element: an error of the arithmetic, and one rounding to the dtype.

    (Of two units: the interpreter truncates. float16 has a smallest number.)
    """
    assert got.shape == expected.shape
    assert got.dtype == dtype
    rounding = 2 * EPS[dtype] * expected.abs() + 2.0**-24 * (dtype == torch.float16)
    excess = (got.double() - expected).abs() - tolerance - rounding
    assert not (excess > 0).any(), f"{excess.max():.3g} above the bound"
    assert not excess.isnan().any()


def check_forward(fn, y, x, params, eps):
    """Sums of D terms by trees: log2(D) roundings, halved by the root in 1 / std, and
    not halved in the mean, whose error counts 1 / std times; 10 operations beside.
    """
    u = EPS[norm_rows.compute_dtype(x.dtype)]
    hat, _, cancelled = statistics(fn, x.double(), eps)
    scale = params[0].double()
    bias = params[1].double() if len(params) > 1 else torch.zeros(())
    roundings = math.log2(max(2, x.shape[-1])) + 10
    size = (hat.abs() + cancelled) * scale.abs() + bias.abs()
    within(y, hat * scale + bias, roundings * u * size, x.dtype)


@BOTH
@settings(max_examples=25)
@given(SHAPES, DTYPES, DTYPES, st.booleans())
def test_forward(fn, shape, dtype, scale_dtype, in_chunks):
    x, residual, params = drawn(fn, shape, dtype, scale_dtype)
    with small() if in_chunks else ExitStack():
        y = fn(x, *params, eps=1e-3, kernel="triton")
        normed, total = fn(x, *params, eps=1e-3, residual=residual, kernel="triton")
    check_forward(fn, y, x, params, 1e-3)
    added = x.double() + residual.double()
    within(total, added, 0.0, dtype)
    check_forward(fn, normed, total, params, 1e-3)


@BOTH
@settings(max_examples=25)
@given(SHAPES, DTYPES, DTYPES, st.booleans())
@example((37, 9), torch.float32, torch.float32, True)
@example((37, 9), torch.bfloat16, torch.float32, True)
@example((3, 127), torch.bfloat16, torch.float32, True)
@example((3, 127), torch.float32, torch.float32, True)
def test_backward(fn, shape, dtype, scale_dtype, in_chunks):
    """Every term by its absolute value bounds what its roundings can be."""
    x, cotangent, params = drawn(fn, shape, dtype, scale_dtype)
    _, total_cotangent, _ = drawn(fn, shape, dtype)
    # A residual of zeros: the sum is x, without a rounding.
    zeros = torch.zeros_like(x)
    with small() if in_chunks else ExitStack():
        options = {"eps": 1e-3, "residual": zeros, "kernel": "triton"}
        _, pull = torch.func.vjp(lambda x, *ps: fn(x, *ps, **options), x, *params)
        x_grad, *grads = pull((cotangent, total_cotangent))
    u = EPS[norm_rows.compute_dtype(dtype)]
    hat, rstd, cancelled = statistics(fn, x.double(), 1e-3)
    y_bar, h_bar = cotangent.double(), total_cotangent.double()
    g = y_bar * params[0].double()
    slope, size = (g * hat).mean(-1, True), (g * hat).abs().mean(-1, True)
    shift = g.mean(-1, True) * (fn is layer_norm)
    expected = rstd * (g - shift - hat * slope) + h_bar
    sizes = (
        g.abs()
        + g.abs().mean(-1, True)
        + (hat.abs() + 1) * (size + g.abs().mean(-1, True))
    )
    roundings = 3 * math.log2(max(2, x.shape[-1])) + 24
    within(
        x_grad,
        expected,
        roundings * u * (rstd * sizes * cancelled + h_bar.abs()),
        dtype,
    )
    lead = tuple(range(x.ndim - 1))
    # Partial sums of rows, one after another at the worst.
    roundings += math.prod(shape[:-1])
    terms = [y_bar * hat, y_bar]
    sizes = [y_bar.abs() * (hat.abs() + 1) * cancelled, y_bar.abs()]
    for got, term, size in zip(grads, terms, sizes, strict=False):
        summed = term.sum(lead) if lead else term
        bound = roundings * u * (size.sum(lead) if lead else size)
        within(got, summed, bound, scale_dtype)


@BOTH
def test_long_rows_at_their_real_sizes(fn):
    x, _, params = drawn(fn, (1, norm_rows.FORWARD_COLUMNS + 5))
    grads = torch.func.grad(lambda *xs: triton(fn)(*xs).square().sum(), (0, 1))
    wanted = torch.func.grad(
        lambda *xs: fn(*xs, kernel="reference").square().sum(), (0, 1)
    )
    check_forward(fn, triton(fn)(x, *params), x, params, {rms_norm: 1e-6}.get(fn, 1e-5))
    with mock.patch.object(norm_rows, "SUM_COLUMNS", 8192):
        got_grads = grads(x, *params)
    for got, want in zip(got_grads, wanted(x, *params), strict=True):
        close(got, want, 2e-6)


def test_a_mean_that_dwarfs_the_deviation():
    x = 1000.0 + torch.randn(4, 300)
    with small():
        chunked = triton(layer_norm)(x, None)
    for y in (triton(layer_norm)(x, None), chunked):
        check_forward(layer_norm, y, x, [torch.ones(300)], 1e-5)
        # mean(x^2) - mean(x)^2 in float32 is off by 0.06 here.
        assert (y.std(-1, correction=0) - 1.0).abs().max() < 1e-4


@BOTH
@pytest.mark.parametrize("in_chunks", [False, True])
def test_every_transformation(fn, in_chunks):
    x, _, params = drawn(fn, (2, 3, 70))
    with small() if in_chunks else ExitStack():
        under_transforms(triton(fn), fn, (x, *params), 1e-5)


@BOTH
@pytest.mark.parametrize("part", [0, 1, None])
def test_every_transformation_with_a_residual(fn, part):
    """With a gradient through the norm only, through the sum only, and through both."""
    x, residual, params = drawn(fn, (2, 3, 9))

    def of(kernel):
        def run(x, residual, *params):
            outs = fn(x, *params, residual=residual, kernel=kernel)
            return outs[part] if part is not None else outs[0] * outs[1]

        return run

    args = (x, residual, *params) if part != 1 else (x, residual)
    if part == 1:
        with_params = {
            k: (lambda f: lambda x, r: f(x, r, *params))(of(k)) for k in KINDS
        }
        under_transforms(with_params["triton"], with_params["reference"], args, 1e-5)
    else:
        under_transforms(of("triton"), of("reference"), args, 1e-5)


KINDS = ("triton", "reference")


@BOTH
def test_gradients_per_sample_are_one_launch_not_one_per_sample(fn):
    x, _, params = drawn(fn, (5, 4, 70))

    def loss(params, x, kernel):
        return fn(x, *params, kernel=kernel).square().sum()

    def per_sample(kernel):
        grad = torch.func.grad(lambda params, x: loss(params, x, kernel))
        return torch.func.vmap(grad, in_dims=(None, 0))

    twice = torch.func.vmap(per_sample("triton"), in_dims=(None, 0))
    for got, want in zip(
        twice(params, x[None]), per_sample("reference")(params, x), strict=True
    ):
        close(got[0], want, 1e-5)
    graph = make_fx(per_sample("triton"))(params, x)
    targets = [str(n.target) for n in graph.graph.nodes]
    assert sum("_backward" in t for t in targets) == 1


@BOTH
def test_without_parameters(fn):
    x, _, _ = drawn(fn, (3, 70))
    under_transforms(
        lambda x: triton(fn)(x, None),
        lambda x: fn(x, None, kernel="reference"),
        (x,),
        1e-5,
    )


def test_a_bias_without_a_scale():
    x, _, (_, bias) = drawn(layer_norm, (3, 70))
    under_transforms(
        lambda x, b: triton(layer_norm)(x, None, b),
        lambda x, b: layer_norm(x, None, b, kernel="reference"),
        (x, bias),
        1e-5,
    )


@BOTH
def test_any_strides(fn):
    x, residual, params = drawn(fn, (70, 12))
    params = [torch.randn(24)[::2] for _ in params]
    got = triton(fn, residual=residual.T.contiguous().T)(x[:, ::1], *params)
    assert torch.equal(got[0], triton(fn)(x + residual, *params))
    assert torch.equal(triton(fn)(x.T.contiguous().T, *params), triton(fn)(x, *params))
    grad = torch.func.grad(lambda x: triton(fn)(x, *params).T.contiguous().sum())
    close(grad(x), torch.func.grad(lambda x: fn(x, *params).sum())(x), 1e-5)
    expanded = torch.randn(12).expand(5, 12)
    close(triton(fn)(expanded, *params), fn(expanded, *params), 1e-6)


@BOTH
def test_a_wrong_backward_shows(fn):
    x, _, params = drawn(fn, (3, 8))
    backward_is_honoured(MODULES[fn], "_transposed", triton(fn), (x, *params))


@BOTH
def test_twice_the_same_bits(fn):
    x, _, params = drawn(fn, (12, 70))
    for sizes in (ExitStack(), small()):
        with sizes:
            run = torch.func.grad_and_value(
                lambda *xs: triton(fn)(*xs).square().sum(), (0, 1)
            )
            (first, value), (again, other) = run(x, *params), run(x, *params)
        assert torch.equal(value, other)
        assert all(map(torch.equal, first, again))


def test_reference_gradients():
    x, _, params = drawn(layer_norm, (3, 4), torch.float64, torch.float64)
    for tensor in (x, *params):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, s: rms_norm_reference(x, s, 1e-3), (x, params[0])
    )
    assert torch.autograd.gradcheck(
        lambda x, s, b: layer_norm_reference(x, s, b, 1e-3), (x, *params)
    )


def written_out(x, scale, eps, centre):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if centre:
        wide = wide - wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * scale).to(x.dtype)


@settings(max_examples=20)
@given(SHAPES, DTYPES, DTYPES)
def test_the_references_keep_their_order_of_operations(shape, dtype, scale_dtype):
    """Bit for bit: what models compute on a CPU must not drift."""
    x, residual, (scale, _) = drawn(layer_norm, shape, dtype, scale_dtype)
    for ours, plain in (
        (rms_norm(x, scale, 1e-5), written_out(x, scale, 1e-5, False)),
        (layer_norm(x, scale, None, 1e-5), written_out(x, scale, 1e-5, True)),
    ):
        assert ours.dtype == dtype
        assert torch.equal(ours.nan_to_num(), plain.nan_to_num())
    y, total = rms_norm(x, scale, residual=residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y.nan_to_num(), rms_norm(total, scale).nan_to_num())


@BOTH
def test_a_second_derivative_is_an_error(fn):
    x, _, params = drawn(fn, (2, 3))
    first = torch.func.grad(lambda x: triton(fn)(x, *params).square().sum())
    with pytest.raises(RuntimeError, match="a first derivative and no second"):
        torch.func.grad(lambda x: first(x).sum())(x)


BAD = [
    ({"x": torch.ones(())}, ValueError, r"x has shape \(\), expected \[..., D\]"),
    (
        {"x": torch.ones(2, 3).long()},
        TypeError,
        "x is torch.int64, expected a floating",
    ),
    ({"x": [1.0]}, TypeError, "x is list, expected a floating tensor"),
    ({"scale": torch.ones(2)}, ValueError, r"scale has shape \(2,\), expected \(3,\)"),
    ({"scale": torch.ones(3).int()}, TypeError, "scale is torch.int32"),
    ({"residual": torch.ones(3)}, ValueError, r"residual has shape \(3,\)"),
    (
        {"residual": torch.ones(2, 3).half()},
        TypeError,
        r"residual is torch.float16, expected torch.float32 as x; use residual.to",
    ),
    (
        {"x": torch.ones(2, 3).to(torch.float8_e4m3fn)},
        TypeError,
        "x is torch.float8_e4m3fn, expected one of",
    ),
    (
        {"x": torch.empty(1, 2**31, device="meta"), "scale": None},
        ValueError,
        "x has 2147483648 columns, expected fewer than",
    ),
    ({"eps": -1e-6}, ValueError, "eps is -1e-06, expected a number >= 0"),
    ({"eps": math.nan}, ValueError, "eps is nan"),
    ({"eps": torch.ones(())}, TypeError, "eps is Tensor, expected a number"),
    ({"kernel": "cuda"}, ValueError, "kernel is 'cuda', expected one of"),
    ({"scale": torch.ones(3, device="meta")}, ValueError, "tensors on cpu, meta"),
]


@BOTH
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(fn, change, error, message):
    good = {"x": torch.ones(2, 3), "scale": torch.ones(3)}
    with pytest.raises(error, match=f"{fn.__name__}: {message}"):
        fn(**good | change)


def test_a_bias_of_another_shape():
    with pytest.raises(ValueError, match=r"layer_norm: bias has shape \(1,\)"):
        layer_norm(torch.ones(2, 3), None, torch.ones(1))


@BOTH
def test_more_programs_for_each_sample_than_are_added_up_at_once(fn):
    x, scale = torch.randn(2, 70, 1100), torch.randn(1100)
    assert norm_rows.SUM_ROWS < 70

    def gradients(kernel):
        def loss(scale, x):
            return fn(x, scale, kernel=kernel).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(scale, x)

    close(gradients("triton"), gradients("reference"), 1e-5)
