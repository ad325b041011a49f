# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy over a vocabulary in parts, added by hand: that of the whole."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from tests.kernels.checks import EPS, close
from tests.kernels.test_cross_entropy import EVERY, OPTIONS, bound, exact, rows
from zfunc.kernels import cross_entropy_shards as module
from zfunc.kernels.cross_entropy import cross_entropy

FORMS = ["triton", "auto"]


def split(logits, sizes):
    """[(first column, columns), ...]."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return list(zip(starts, logits.split(sizes, -1), strict=True))


def combined(parts):
    """What a pmax and a psum over the ranks make of them."""
    maximum = torch.stack([part.maximum for part in parts]).amax(0)
    finite = maximum.masked_fill(maximum.isinf(), 0.0)
    weight = sum(part.weight * (part.maximum - finite).exp() for part in parts)
    sums = [sum(xs) for xs in zip(*(part[2:] for part in parts), strict=True)]
    return module.Statistics(maximum, weight, *sums)


def parallel(logits, targets, grad, sizes, kernel, **options):
    """Losses and gradient by way of the shards."""
    shards = split(logits, sizes)
    V = logits.shape[-1]
    own = {key: options.pop(key) for key in ("softcap",)}
    shared = {"ignore_index": options["ignore_index"], "kernel": kernel}
    statistics = combined(
        [
            module.cross_entropy_statistics(
                part, targets, vocab_start=start, **shared, **own
            )
            for start, part in shards
        ]
    )
    losses, L = module.losses_of_statistics(
        statistics, targets, vocab_size=V, **options
    )
    slopes = [
        module.cross_entropy_shard_gradient(
            grad,
            part,
            targets,
            L,
            vocab_start=start,
            vocab_size=V,
            kernel=kernel,
            **options,
            **own,
        )
        for start, part in shards
    ]
    return losses, torch.cat(slopes, -1)


@given(
    st.sampled_from([(1, 1, 1), (7, 3), (128, 1), (50, 60, 17), (4, 4, 4, 4)]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    OPTIONS,
)
@settings(max_examples=15)
def test_shards_are_the_whole(sizes, dtype, options):
    logits, targets, grad = rows((3,), sum(sizes), dtype, options["ignore_index"])
    x64 = logits.double().clone().requires_grad_()
    losses64 = exact(x64, targets, **options)
    losses64.backward(grad.double())
    for kernel in FORMS:
        losses, slopes = parallel(logits, targets, grad, sizes, kernel, **options)
        assert losses.dtype == torch.promote_types(dtype, torch.float32)
        assert slopes.dtype == dtype
        close(losses, losses64, bound(dtype))
        close(slopes, x64.grad, bound(dtype) + 2 * EPS[dtype])


@pytest.mark.parametrize("kernel", FORMS)
def test_a_shard_of_nothing_but_minus_infinity(kernel):
    logits = torch.randn(2, 8)
    logits[:, :4] = -torch.inf
    targets = torch.tensor([5, -100])
    options = {"ignore_index": -100, "softcap": None}
    losses, slopes = parallel(logits, targets, torch.ones(2), (4, 4), kernel, **options)
    close(losses, cross_entropy(logits, targets), 8 * EPS[torch.float32])
    assert slopes.isfinite().all()
    assert not slopes[1].any()


def test_mapped_and_traced():
    logits, targets = torch.randn(3, 4, 6), torch.randint(6, (3, 4))

    def statistics(x, t, kernel="triton"):
        return tuple(
            module.cross_entropy_statistics(x, t, vocab_start=2, kernel=kernel)
        )

    expected = statistics(logits, targets)
    for got in (
        torch.func.vmap(statistics)(logits, targets),
        make_fx(lambda x, t: statistics(x, t))(logits, targets)(logits, targets),
        statistics(logits.mT.contiguous().mT, targets),
    ):
        assert all(map(torch.equal, got, expected))
    empty = statistics(logits[:0], targets[:0])
    assert all(x.shape == (0, 4) for x in empty)
    for got, want in zip(statistics(logits, targets, "auto"), expected, strict=True):
        close(got, want, 16 * EPS[torch.float32])


def test_a_label_out_of_the_whole_range():
    logits, targets, ones = torch.randn(2, 6), torch.tensor([1, 6]), torch.ones(2)
    statistics = module.cross_entropy_statistics(logits, targets, vocab_start=0)
    with pytest.raises(ValueError, match=r"targets\[1\] is 6, expected a label in"):
        module.losses_of_statistics(statistics, targets, vocab_size=6)
    for kernel in FORMS:
        slopes = module.cross_entropy_shard_gradient(
            ones, logits, targets, ones, vocab_start=0, vocab_size=6, kernel=kernel
        )
        assert slopes.isnan().all(-1).tolist() == [False, True]


@pytest.mark.parametrize("options", [{}, EVERY])
def test_nothing_is_silently_constant(options):
    logits, targets = torch.randn(1, 4), torch.tensor([1])
    options = {k: options[k] for k in ("softcap", "ignore_index") if k in options}
    with pytest.raises(RuntimeError, match="no derivative of its own"):
        torch.func.grad(
            lambda x: sum(
                module.cross_entropy_statistics(
                    x, targets, vocab_start=0, kernel="triton", **options
                )
            ).sum()
        )(logits)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(2, 3).int()}, TypeError, "logits is torch.int32"),
        ({"targets": torch.ones(2)}, TypeError, "targets is torch.float32"),
        ({"targets": torch.zeros(3).long()}, ValueError, "targets has shape"),
        ({"logits": torch.ones(2, 0)}, ValueError, "V >= 1"),
        ({"vocab_start": -1}, ValueError, "vocab_start is -1"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
    ],
)
def test_bad_input(change, error, message):
    good = {"logits": torch.randn(2, 3), "targets": torch.tensor([0, 1])}
    arguments = good | {"vocab_start": 0} | change
    with pytest.raises(error, match=message):
        module.cross_entropy_statistics(**arguments)
    rest = {"cotangents": torch.ones(2), "logsumexp": torch.ones(2), "vocab_size": 3}
    with pytest.raises(error, match=message):
        module.cross_entropy_shard_gradient(**(arguments | rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cotangents": torch.ones(3)}, "cotangents has shape"),
        ({"logsumexp": torch.ones(2, 1)}, "logsumexp has shape"),
        ({"vocab_start": 2}, r"columns \[2, 5\), expected within \[0, 4\)"),
    ],
)
def test_bad_gradient_input(change, message):
    good = {
        "cotangents": torch.ones(2),
        "logits": torch.randn(2, 3),
        "targets": torch.tensor([0, 1]),
        "logsumexp": torch.ones(2),
        "vocab_start": 0,
        "vocab_size": 4,
    }
    with pytest.raises(ValueError, match=message):
        module.cross_entropy_shard_gradient(**(good | change))
