# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy: Triton against torch's in float64, and under every transformation."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from tests.kernels.checks import EPS, backward_is_honoured, close, under_transforms
from zfunc.kernels import cross_entropy as module

SHAPES = st.sampled_from(
    [
        ((), 5),
        ((0,), 3),
        ((1,), 1),
        ((2, 3), 127),
        ((5,), 128),
        ((4,), 129),
        ((3, 0), 7),
    ]
)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])
# The interpreter rounds constants to float32, also in arithmetic in float64.
OPTIONS = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.125, 1.0]),
        "z_loss": st.sampled_from([0.0, 2.0**-7]),
        "ignore_index": st.sampled_from([-100, 0]),
        "softcap": st.sampled_from([None, 5.0]),
    }
)
EVERY = {"label_smoothing": 0.125, "z_loss": 2.0**-7, "ignore_index": 2, "softcap": 5.0}
FORMS = ["triton", "auto"]
HUGE = torch.empty(2, 2**31, dtype=torch.bfloat16, device="meta")


def triton(logits, targets, **options):
    return module.cross_entropy(logits, targets, kernel="triton", **options)


def exact(logits, targets, label_smoothing, z_loss, ignore_index, softcap):
    """torch's loss in float64, and the z-loss added."""
    x = logits.double()
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    flat, labels = x.reshape(-1, x.shape[-1]), targets.reshape(-1).long()
    losses = F.cross_entropy(
        flat,
        labels,
        reduction="none",
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
    squares = z_loss * flat.logsumexp(-1).square()
    return (losses + squares * (labels != ignore_index)).reshape(targets.shape)


def rows(shape, V, dtype, ignore_index):
    torch.manual_seed(0)
    logits = torch.randn(*shape, V).mul(4).to(dtype)
    targets = torch.randint(0, V, shape)
    targets = torch.where(torch.rand(shape) < 0.3, ignore_index, targets)
    return logits, targets, torch.randn(shape)


def bound(dtype):
    # Logits of the size of 16, of which each of some ten operations rounds.
    return 256 * EPS[torch.float64 if dtype == torch.float64 else torch.float32]


@given(SHAPES, DTYPES, OPTIONS, st.sampled_from([torch.int64, torch.int32]))
@example(((2,), 5000), torch.bfloat16, EVERY, torch.int64)
@example(((2,), 8192), torch.float32, EVERY | {"softcap": None}, torch.int64)
@settings(max_examples=30)
def test_losses_and_gradients(rows_and_classes, dtype, options, label_dtype):
    logits, targets, grad = rows(*rows_and_classes, dtype, options["ignore_index"])
    targets = targets.to(label_dtype)
    x64 = logits.double().clone().requires_grad_()
    losses64 = exact(x64, targets, **options)
    losses64.backward(grad.double())
    for kernel in FORMS:
        losses, pull = torch.func.vjp(
            lambda x, kernel=kernel: module.cross_entropy(
                x, targets, kernel=kernel, **options
            ),
            logits,
        )
        assert losses.dtype == torch.promote_types(dtype, torch.float32)
        close(losses, losses64, bound(dtype))
        (slopes,) = pull(grad.to(losses.dtype))
        assert slopes.dtype == dtype
        close(slopes, x64.grad, bound(dtype) + 2 * EPS[dtype])
        both = module.cross_entropy_and_gradient(
            logits, targets, row_weights=grad, kernel=kernel, **options
        )
        assert torch.equal(both[0], losses)
        close(both[1], x64.grad, bound(dtype) + 2 * EPS[dtype])


def test_any_strides():
    logits = torch.randn(7, 6, 5).permute(2, 0, 1)
    targets = torch.randint(0, 6, (7, 5)).t()
    losses = triton(logits, targets)
    assert torch.equal(losses, triton(logits.contiguous(), targets.contiguous()))


@pytest.mark.parametrize("kernel", FORMS)
def test_a_row_without_a_label_is_zero_whatever_it_holds(kernel):
    logits = torch.tensor([[1.0, 2.0], [math.nan, math.inf]])
    losses, pull = torch.func.vjp(
        lambda x: module.cross_entropy(x, torch.tensor([0, -100]), kernel=kernel),
        logits,
    )
    assert losses[1] == 0
    slopes = pull(torch.ones(2))[0]
    assert slopes[0].isfinite().all()
    assert not slopes[1].any()


@pytest.mark.parametrize("kernel", FORMS)
def test_minus_infinity_takes_no_part(kernel):
    logits = torch.randn(2, 9000)
    logits[:, :5000] = -math.inf
    targets = torch.tensor([6000, 8999])
    losses = module.cross_entropy(logits, targets, kernel=kernel)
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    close(losses, expected, bound(torch.float32))


def test_small_logits_keep_their_digits_under_a_softcap():
    x = torch.tensor([[1e-3, -2e-3, 5.9, 6.1, -40.0]])
    hot = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0]])
    slopes = torch.func.grad(
        lambda x: triton(x * hot, torch.tensor([0]), softcap=30.0).sum()
    )(x)
    expected = torch.func.grad(
        lambda x: exact(x, torch.tensor([0]), 0.0, 0.0, -100, 30.0).sum()
    )(x.double())
    close(slopes, expected, 8 * EPS[torch.float32])


def test_a_label_out_of_range_is_an_error_or_nan():
    logits = torch.randn(3, 4)
    targets = torch.tensor([0, 4, -1])
    with pytest.raises(ValueError, match=r"targets\[1\] is 4, expected.*\[0, 4\)"):
        module.cross_entropy(logits, targets)
    traced = make_fx(lambda x, t: module.cross_entropy(x, t))(
        logits, targets.clamp(0, 3)
    )
    with pytest.raises(ValueError, match=r"targets\[1\] is 4"):
        traced(logits, targets)
    losses, pull = torch.func.vjp(lambda x: triton(x, targets), logits)
    (slopes,) = pull(torch.ones(3))
    for x in (losses, slopes[:, 0], slopes[:, 3]):
        assert x.isnan().tolist() == [False, True, True]
    _, slopes = module.cross_entropy_and_gradient(logits, targets, kernel="triton")
    assert slopes.isnan().all(-1).tolist() == [False, True, True]


def test_every_transformation():
    targets = torch.tensor([1, 2, 8, 0, 4])
    under_transforms(
        lambda x: triton(x, targets, **EVERY),
        lambda x: module.cross_entropy(x, targets, **EVERY),
        (torch.randn(5, 9),),
        1e-6,
    )


@pytest.mark.parametrize("kernel", FORMS)
def test_mapped_over_labels(kernel):
    logits, targets = torch.randn(4, 9), torch.randint(0, 9, (3, 4))
    mapped = torch.func.vmap(
        lambda t: module.cross_entropy(logits, t, kernel=kernel),
    )(targets)
    alone = [module.cross_entropy(logits, t, kernel=kernel) for t in targets]
    assert torch.equal(mapped, torch.stack(alone))


def test_a_wrong_backward_shows():
    targets = torch.tensor([0, 3, 1])
    backward_is_honoured(
        module, "_transposed", lambda x: triton(x, targets), (torch.randn(3, 4),)
    )


def test_reference_gradients():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 2, 4, 1])

    def f(x):
        return module.cross_entropy_reference(x, targets, **EVERY)

    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


def test_the_same_bits_twice():
    logits, targets = torch.randn(3, 9000), torch.tensor([1, 5000, 8999])
    first, second = (
        module.cross_entropy_and_gradient(logits, targets, kernel="triton")
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_an_error():
    first = torch.func.grad(lambda x: triton(x, torch.tensor([0])).sum())
    with pytest.raises(RuntimeError, match="a first derivative and no second"):
        torch.func.grad(lambda x: first(x).square().sum())(torch.randn(1, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(2, 3).long()}, TypeError, "logits is torch.int64"),
        ({"logits": torch.ones(2, 0)}, ValueError, r"\(2, 0\).*V >= 1"),
        ({"targets": torch.ones(2)}, TypeError, r"use targets\.long\(\)"),
        ({"targets": [0, 1]}, TypeError, "targets is list"),
        ({"targets": torch.ones(2) > 0}, TypeError, "targets is torch.bool"),
        ({"targets": torch.zeros(3).long()}, ValueError, r"\(3,\), expected \(2,\)"),
        ({"targets": torch.zeros(2).long().to("meta")}, ValueError, "one device"),
        ({"label_smoothing": 1.5}, ValueError, r"1\.5, expected a number in \[0, 1\]"),
        ({"z_loss": -1.0}, ValueError, "z_loss is -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0.*None is off"),
        ({"z_loss": torch.ones(())}, TypeError, "z_loss is Tensor, expected a number"),
        ({"softcap": "30"}, TypeError, "softcap is str"),
        ({"ignore_index": 0.5}, ValueError, "ignore_index is 0.5, expected a label"),
        ({"logits": HUGE}, ValueError, "2147483648 columns, expected fewer than"),
        ({"kernel": "cuda"}, ValueError, 'type kernel="auto"'),
    ],
)
def test_bad_input(change, error, message):
    good = {"logits": torch.randn(2, 3), "targets": torch.tensor([0, 1])}
    with pytest.raises(error, match=message):
        module.cross_entropy(**(good | change))
    with pytest.raises(error, match=message):
        module.cross_entropy_and_gradient(**(good | change))


def test_row_weights_that_do_not_fit():
    x, t = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"row_weights has shape \(3,\)"):
        module.cross_entropy_and_gradient(x, t, row_weights=torch.ones(3))
