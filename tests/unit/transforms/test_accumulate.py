# SPDX-License-Identifier: Apache-2.0
"""``accumulate``: exact means, the right slices, the memory of one microbatch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.core.common import (
    F64,
    STAGES,
    alone,
    assert_bitwise,
    assert_same_gradient,
    example_batch,
    example_params,
    on_mesh,
    randn,
    reference,
    whole_numbers,
)
from zfunc.testing.memory import peak_live_bytes

COUNTS = [1, 2, 3, 6]


def loss(params, batch):
    y = torch.tanh(batch["x"] @ params["w"] + params["b"])
    return (y - batch["y"]).square().mean()


def weighted(params, batch):
    """A mean over tokens, of which every sample has another number."""
    y = batch["x"] @ params["w"]
    tokens = batch["index"]
    return zf.Mean((tokens.unsqueeze(1) * y).sum(), tokens.sum())


@pytest.mark.parametrize("count", COUNTS)
def test_equal_microbatches_are_the_whole_batch(count):
    want = reference(loss, example_params(), example_batch())
    got = reference(loss, example_params(), example_batch(), zf.accumulate(count))
    assert_same_gradient(got, want)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("zero", [None, *STAGES])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_mean_is_exact_to_the_last_bit(count, zero, ranks):
    """Whole numbers: no order of adding them up rounds."""
    params = {"w": whole_numbers(5, 4)}
    batch = {"x": whole_numbers(12, 5, seed=1), "index": torch.arange(12) % 5}
    want = reference(weighted, params, batch)
    if zero is None:
        got = reference(weighted, params, batch, zf.accumulate(count))
    else:
        got = on_mesh(
            weighted, params, batch, zf.accumulate(count), zero=zero, ranks=ranks
        )
    assert_bitwise(got.grads, want.grads)
    assert_bitwise(got.metrics.loss, want.metrics.loss)


@given(st.lists(st.integers(0, 5), min_size=4, max_size=4), st.sampled_from([1, 2, 4]))
def test_unequal_weights_and_microbatches_of_none(weights, count):
    params, batch = (
        {"w": whole_numbers(3, 2)},
        {
            "x": whole_numbers(4, 3, seed=1),
            "index": torch.tensor(weights),
        },
    )
    want = reference(weighted, params, batch)
    got = reference(weighted, params, batch, zf.accumulate(count))
    assert_bitwise(got.grads, want.grads)
    assert torch.isfinite(got.metrics.loss)


def test_a_mean_of_means_would_be_another_number():
    """What Mean is for: the plain scalar of unequal microbatches is biased."""

    def biased(params, batch):
        mean = weighted(params, batch)
        return mean.total / mean.weight

    params, batch = {"w": whole_numbers(5, 4)}, example_batch()
    exact = reference(weighted, params, batch, zf.accumulate(3)).metrics.loss
    other = reference(biased, params, batch, zf.accumulate(3)).metrics.loss
    assert abs(exact - other) > 1e-3


@pytest.mark.parametrize("count", [2, 3])
def test_aux_is_averaged_and_its_means_are_exact(count):
    def with_aux(params, batch):
        mean = zf.Mean(batch["index"].sum(), batch["index"].numel())
        return loss(params, batch), {"mean": mean, "max": batch["index"].max()}

    batch = {**example_batch(), "index": torch.tensor([0, 1, 2, 3, 4, 5])}
    got = reference(with_aux, example_params(), batch, zf.accumulate(count)).metrics.aux
    assert got["mean"] == 2.5
    last_of_each = batch["index"].view(count, -1)[:, -1]
    assert got["max"] == last_of_each.double().mean()


def test_the_slices_and_what_is_not_sliced():
    seen = []

    def looking(params, batch, key):
        seen.append(batch)
        return params["w"].sum()

    batch = {
        "x": torch.arange(6),
        "nested": [torch.arange(12).view(6, 2), None],
        "scale": torch.tensor(2.0),
        "name": "text",
        "number": 3,
        "empty": torch.ones(0, 2),
    }
    reference(looking, {"w": torch.ones(2)}, batch, zf.accumulate(3))
    assert [b["x"].tolist() for b in seen] == [[0, 1], [2, 3], [4, 5]]
    assert [b["nested"][0].shape for b in seen] == [(2, 2)] * 3
    for b in seen:
        assert b["scale"] is batch["scale"]
        assert (b["name"], b["number"], b["nested"][1]) == ("text", 3, None)
        assert b["empty"].shape == (0, 2)


@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (6, 1), (1, 6)])
def test_nested_counts_multiply(counts):
    slices = {}

    def run(*transforms):
        seen = slices.setdefault(len(transforms), [])

        def looking(params, batch, key):
            seen.append((batch["index"].tolist(), key.tolist()))
            return loss(params, batch)

        return reference(looking, example_params(), example_batch(), *transforms)

    want, got = run(zf.accumulate(6)), run(*[zf.accumulate(n) for n in counts])
    assert slices[2] == slices[1]
    assert_same_gradient(got, want)


@pytest.mark.parametrize("batch", [None, (), {"n": 3}])
def test_a_batch_without_tensors_is_given_every_time(batch):
    calls = []

    def looking(params, given):
        calls.append(given)
        return params["w"].sum()

    state = reference(looking, {"w": torch.ones(2)}, batch, zf.accumulate(3))
    assert calls == [batch] * 3
    assert state.grads["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_gradients_add_up_in_float32(dtype):
    """256 ones and a 256: bfloat16 would stay at 256 from the first to the last."""
    params = {"w": torch.ones(1, dtype=dtype)}
    batch = torch.ones(257, dtype=dtype)
    batch[0] = 256

    def total(p, b):
        return zf.Mean((p["w"] * b).sum(), 1)

    state = reference(total, params, batch, zf.accumulate(257))
    want = torch.tensor(512 / 257, dtype=torch.float32)
    torch.testing.assert_close(
        state.grads["w"].float(), want.reshape(1), rtol=5e-3, atol=0
    )


def test_memory_is_that_of_one_microbatch():
    width, samples, count = 8, 4096, 8
    params = [randn(width, width, seed=i, dtype=torch.float32) for i in range(4)]
    x = randn(samples, width, dtype=torch.float32)

    def deep(params, x):
        for w in params:
            x = torch.tanh(x @ w).sin()
        return x.square().mean()

    def peak(*transforms):
        step = zf.train_step(deep, zf.optim.sgd(0.1), *transforms)
        return peak_live_bytes(step, zf.shard(params, alone()), x)[1] - x.nbytes

    whole, pieces = peak(), peak(zf.accumulate(count))
    assert pieces < whole / count * 1.2


def test_memory_does_not_grow_with_the_number_of_microbatches():
    params = [randn(32, 32, seed=i, dtype=torch.float32) for i in range(8)]
    psi = 8 * 32 * 32 * 4

    def small(params, x):
        return sum((p * p).sum() for p in params) * x.mean()

    def peak(count):
        step = zf.train_step(small, zf.optim.sgd(0.1), zf.accumulate(count))
        return peak_live_bytes(step, zf.shard(params, alone()), torch.ones(16))[1]

    assert peak(16) <= peak(4)
    assert peak(4) <= peak(2) + 0.5 * psi
    assert peak(2) <= peak(1) + 2.1 * psi


# --- misuse -------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "2", None])
def test_counts_that_are_none(count):
    with pytest.raises(ValueError, match="num_microbatches is an int >= 1"):
        zf.accumulate(count)


@pytest.mark.parametrize("count", [4, 5, 7])
def test_a_batch_that_does_not_divide(count):
    with pytest.raises(
        ValueError, match=rf"accumulate\({count}\): batch\['index'\] has 6"
    ):
        reference(loss, example_params(), example_batch(), zf.accumulate(count))


def test_the_path_of_the_leaf_is_named():
    batch = {"x": torch.ones(4), "y": [torch.ones(4), torch.ones(3)]}
    with pytest.raises(ValueError, match=r"batch\['y/1'\] has 3 samples"):
        reference(lambda p, b: p.sum(), torch.ones(2), batch, zf.accumulate(2))


def test_leaves_of_different_lengths_are_refused():
    """A table of 4 classes is no batch of 4 samples; cut in two it would be wrong."""
    batch = {"class_weights": torch.ones(4, dtype=F64), "x": randn(6, 5)}
    with pytest.raises(ValueError, match="class_weights"):
        reference(lambda p, b: p.sum(), torch.ones(2), batch, zf.accumulate(2))
