# SPDX-License-Identifier: Apache-2.0
"""Linear cross-entropy: chunks against all logits at once, in value and in memory."""

import json
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile

from tests.kernels.checks import EPS, backward_is_honoured, close, under_transforms
from tests.kernels.test_cross_entropy import EVERY, OPTIONS, exact
from zfunc.kernels import linear_cross_entropy as module

FORMS = ["triton", "auto"]
SOME = EVERY | {"ignore_index": -100}
LABELS = torch.tensor([3, 0, 2, 4, -100])


def linear(hidden, weight, targets=LABELS, **options):
    return module.linear_cross_entropy(hidden, weight, targets, **options)


def sample(N, V, H, dtype, ignore_index):
    torch.manual_seed(0)
    targets = torch.randint(0, V, (N,)).masked_fill(torch.rand(N) < 0.2, ignore_index)
    hidden, weight = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype)
    return hidden, weight, targets, torch.rand(N)


@given(
    st.sampled_from([(0, 3, 2), (1, 1, 1), (2, 7, 0), (3, 13, 5), (2, 129, 8)]),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    OPTIONS,
    st.sampled_from([1, 3000, 2**29]),
    st.booleans(),
)
@settings(max_examples=20)
def test_any_workspace(shape, dtype, options, workspace, weighted):
    hidden, weight, targets, weights = sample(*shape, dtype, options["ignore_index"])
    weights = weights if weighted else None
    wide = torch.promote_types(dtype, torch.float32)
    args64 = [x.double().clone().requires_grad_() for x in (hidden, weight)]
    # A matrix product's logits are of the dtype, as those of the layer would be.
    losses = exact((hidden @ weight.mT).double(), targets, **options)
    losses64 = exact(args64[0] @ args64[1].mT, targets, **options)
    of_rows = 1.0 if weights is None else weights
    (losses64 * of_rows).sum().backward()
    # Rounded logits of the size of 16 move a loss by as much, and a gradient by the
    # size of hidden and of weight times as much.
    bound = 64 * EPS[wide] * max(1, shape[0])
    for kernel in FORMS:
        rest = {"row_weights": weights, "workspace_bytes": workspace, "kernel": kernel}
        value, pull = torch.func.vjp(
            lambda h, w, rest=rest: linear(h, w, targets, **rest, **options),
            hidden,
            weight,
        )
        assert value.dtype == wide
        close(value, (losses * of_rows).sum(), bound)
        without = linear(hidden, weight, targets, **rest, **options)
        assert torch.equal(without, value)
        for got, want in zip(pull(torch.ones((), dtype=wide)), args64, strict=True):
            assert got.dtype == dtype
            close(got, want.grad, bound + 64 * EPS[dtype] * (dtype != wide))


@pytest.mark.parametrize("kernel", FORMS)
def test_every_transformation(kernel):
    args = torch.randn(5, 3), torch.randn(6, 3), torch.rand(5)
    under_transforms(
        lambda h, w, r: linear(
            h, w, row_weights=r, kernel=kernel, workspace_bytes=60, **SOME
        ),
        lambda h, w, r: linear(h, w, row_weights=r, kernel="reference", **SOME),
        args,
        2e-6,
    )


def test_a_chunk_has_whole_tiles_and_at_least_a_row():
    # Of 10 bytes a row, 5000 rows there.
    chunks = [module._chunk(10, 5000, w) for w in (1, 95, 1279, 2600, 10**9)]
    assert chunks == [1, 9, 127, 256, 5000]
    hidden, weight = torch.randn(300, 2), torch.randn(3, 2)
    targets = torch.randint(3, (300,))
    gradient = torch.func.grad_and_value(linear, (0, 1))
    small = gradient(hidden, weight, targets, workspace_bytes=128 * 3 * 4)
    (hidden_grad, weight_grad), value = gradient(hidden, weight, targets)
    close(small[1], value, 300 * EPS[torch.float32])
    close(small[0][0], hidden_grad, 4 * EPS[torch.float32])
    close(small[0][1], weight_grad, 300 * EPS[torch.float32])


def test_chunks_add_up_in_float32():
    # Each row gives the first class -1/2; a bfloat16 sum of them would stop at -128.
    hidden, weight = torch.ones(600, 1).bfloat16(), torch.zeros(2, 1).bfloat16()
    targets = torch.zeros(600).long()
    grad = torch.func.grad(linear, 1)(hidden, weight, targets, workspace_bytes=1)
    assert grad.flatten().tolist() == [-300, 300]


def test_few_chunks_add_up_in_their_dtype_where_float32_does_not_fit():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, 64, generator=generator).bfloat16() for n in (32, 16)
    )
    targets = torch.randint(16, (32,), generator=generator)
    row_bytes = 16 * (2 * 2 + 4)
    grads = [
        torch.func.grad(linear, 1)(hidden, weight, targets, workspace_bytes=b)
        for b in (8 * row_bytes, 2**20)  # four chunks, one
    ]
    exact = torch.func.grad(linear, 1)(hidden.double(), weight.double(), targets)
    assert not torch.equal(*grads)
    for grad in grads:
        close(grad, exact, 8 * EPS[torch.bfloat16])


def test_mapped_over_labels():
    hidden, weight, targets = (
        torch.randn(4, 3),
        torch.randn(5, 3),
        torch.randint(5, (2, 4)),
    )
    mapped = torch.func.vmap(lambda t: linear(hidden, weight, t))(targets)
    assert torch.equal(
        mapped, torch.stack([linear(hidden, weight, t) for t in targets])
    )


def asked_for(fn, *args):
    """What the forward is asked for: [(for hidden, for weight), ...]."""
    asked = []
    right = module.gradients_op

    def watched(*xs):
        asked.append(xs[4:6])
        return right(*xs)

    with mock.patch.object(module, "gradients_op", watched):
        fn(*args)
    return asked


def test_gradients_are_made_for_those_who_ask():
    hidden, weight = torch.randn(5, 3), torch.randn(5, 3)
    grad, vmap = torch.func.grad, torch.func.vmap
    stacked = torch.stack([hidden, hidden])
    assert asked_for(linear, hidden, weight) == [(False, False)]
    assert asked_for(grad(linear), hidden, weight) == [(True, False)]
    assert asked_for(grad(linear, 1), hidden, weight) == [(False, True)]
    assert asked_for(grad(linear, (0, 1)), hidden, weight) == [(True, True)]
    leaf = hidden.clone().requires_grad_()
    assert asked_for(linear, leaf, weight) == [(True, False)]
    with torch.no_grad():
        assert asked_for(linear, leaf, weight) == [(False, False)]

    def total(h, w):
        return vmap(linear, (0, None))(h, w).sum()

    # A level of vmap is looked through, inside a gradient and around one.
    assert set(asked_for(grad(total), stacked, weight)) == {(True, False)}
    around = vmap(grad(linear, 1), (0, None))
    assert set(asked_for(around, stacked, weight)) == {(False, True)}


def test_a_gradient_that_nobody_seemed_to_want():
    args = torch.randn(5, 3), torch.randn(6, 3)
    gradient = torch.func.grad(linear, (0, 1))
    expected = gradient(*args)
    with mock.patch.object(module, "_wanted", return_value=False):
        assert all(map(torch.equal, gradient(*args), expected))


def test_a_wrong_backward_shows():
    args = torch.randn(5, 3), torch.randn(6, 3)
    backward_is_honoured(module, "_scaled", linear, args)


def test_a_second_derivative_is_an_error():
    h, w = torch.randn(5, 3), torch.randn(6, 3)
    for argument in (0, 1):
        first = torch.func.grad(linear, argument)
        with pytest.raises(RuntimeError, match="first derivative and no second"):
            torch.func.grad(lambda *xs, f=first: f(*xs).sum(), argument)(h, w)
    hessian = torch.func.hessian(lambda h: linear(h, w, kernel="reference"))(h)
    assert hessian.shape == (5, 3, 5, 3)


def test_reference_gradients():
    args = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 6)]
    assert torch.autograd.gradcheck(
        lambda h, w: linear(h, w, kernel="reference", **SOME), args
    )


@pytest.mark.parametrize("kernel", FORMS)
def test_the_same_bits_twice(kernel):
    args = torch.randn(5, 3), torch.randn(6, 3)
    gradient = torch.func.grad_and_value(linear, (0, 1))
    (first, value), (second, again) = (gradient(*args, kernel=kernel) for _ in range(2))
    assert all(map(torch.equal, (*first, value), (*second, again)))


@pytest.mark.parametrize("kernel", FORMS)
def test_rows_to_ignore_give_nothing(kernel):
    hidden, weight = torch.randn(5, 3), torch.randn(6, 3)
    hidden[4] = torch.nan
    gradient = torch.func.grad_and_value(linear)
    (hidden_grad, value) = gradient(hidden, weight, kernel=kernel)
    assert value.isfinite()
    assert hidden_grad[:4].isfinite().all()
    assert not hidden_grad[4].any()


def test_labels_out_of_range():
    hidden, weight = torch.randn(5, 3), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"targets\[3\] is 4, expected a label"):
        linear(hidden, weight)
    assert linear(hidden, weight, kernel="triton").isnan()


def test_a_traced_loss_takes_other_labels():
    args = torch.randn(5, 3), torch.randn(6, 3)
    gradient = torch.func.grad(lambda h, w, t: linear(h, w, t))
    traced = make_fx(gradient)(*args, LABELS)
    other = torch.tensor([1, 1, 5, -100, 0])
    assert torch.equal(traced(*args, other), gradient(*args, other))


def peak_bytes(fn, folder):
    """The most that a call has allocated at once."""
    with profile(profile_memory=True) as profiler:
        fn()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    sizes = [e["args"] for e in events if e.get("name") == "[memory]"]
    totals = [size["Total Allocated"] for size in sizes]
    return max(totals) - (totals[0] - sizes[0]["Bytes"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_peak_is_the_workspace_and_the_gradients(dtype, softcap, tmp_path):
    N, V, H, workspace = 512, 4096, 32, 2**20
    hidden, weight, targets, _ = sample(N, V, H, dtype, -100)
    gradient = torch.func.grad(linear, (0, 1))

    def peak(**options):
        return peak_bytes(
            lambda: gradient(hidden, weight, targets, softcap=softcap, **options),
            tmp_path,
        )

    # Besides the chunk: the gradients, twice (before and after the cotangent), the
    # float32 sum of the one of weight, and some numbers per row.
    gradients = 2 * (N + V) * H * dtype.itemsize + V * H * 4 + 64 * N
    assert peak(workspace_bytes=workspace) <= workspace + gradients
    assert peak(kernel="reference") >= 10 * (workspace + gradients)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(2, 3).int()}, TypeError, "hidden is torch.int32"),
        ({"weight": torch.ones(4, 3).double()}, TypeError, r"weight\.to\(hidden"),
        ({"targets": torch.ones(2)}, TypeError, r"use targets\.long\(\)"),
        ({"hidden": torch.ones(1, 2, 3)}, ValueError, r"hidden\.flatten\(0, -2\)"),
        ({"weight": torch.ones(0, 3)}, ValueError, "V >= 1"),
        ({"weight": torch.ones(4, 5)}, ValueError, r"\(4, 5\), expected \(4, 3\)"),
        ({"targets": torch.zeros(3).long()}, ValueError, r"\(3,\), expected \(2,\)"),
        ({"row_weights": torch.ones(3)}, ValueError, "row_weights has shape"),
        ({"row_weights": torch.ones(2).int()}, TypeError, "row_weights is"),
        ({"weight": torch.ones(4, 3).to("meta")}, ValueError, "one device"),
        ({"workspace_bytes": 0}, ValueError, "workspace_bytes is 0"),
        ({"workspace_bytes": "1"}, TypeError, "workspace_bytes is str, expected a num"),
        ({"label_smoothing": -0.5}, ValueError, r"-0\.5, expected a number in"),
        ({"kernel": "cuda"}, ValueError, 'type kernel="auto"'),
    ],
)
def test_bad_input(change, error, message):
    good = {
        "hidden": torch.randn(2, 3),
        "weight": torch.randn(4, 3),
        "targets": torch.tensor([0, 1]),
    }
    with pytest.raises(error, match=message):
        module.linear_cross_entropy(**(good | change))


@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_logits_whose_squares_overflow(kernel):
    hidden, weight = torch.full((1, 1), 1e20), torch.tensor([[1.0], [0.5]])
    loss = module.linear_cross_entropy(hidden, weight, torch.tensor([0]), kernel=kernel)
    assert loss == 0.0
