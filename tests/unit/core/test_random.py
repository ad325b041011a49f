# SPDX-License-Identifier: Apache-2.0
"""Keys and numbers: uniform, independent, and the same on every mesh."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.core.common import F64, STAGES, alone, on_mesh, reference
from zfunc.core.random import dropout, fold_in, uniform

INTEGERS = st.integers(-(2**63), 2**63 - 1)
SAMPLES = 12


def key_of(seed=0):
    return torch.tensor(seed)


def chi_square(numbers, bins):
    counts = torch.histc(numbers.double(), bins, 0, 1)
    expected = numbers.numel() / bins
    return float(((counts - expected) ** 2 / expected).sum())


def assert_uniform(numbers, bins=64):
    """Within six standard deviations of what uniform numbers give."""
    freedom = bins - 1
    assert chi_square(numbers, bins) < freedom + 6 * (2 * freedom) ** 0.5


# --- keys ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["data", "keys", "chain"])
def test_keys_do_not_collide(how):
    index = torch.arange(100_000)
    if how == "data":
        keys = fold_in(key_of(7), index)
    elif how == "keys":
        keys = fold_in(index, torch.tensor(7))
    else:
        keys = fold_in(fold_in(key_of(), index[:400, None]), index[:250])
    assert keys.dtype == torch.int64
    assert len(keys.unique()) == keys.numel() == 100_000


@given(INTEGERS, INTEGERS)
def test_an_integer_and_a_tensor_are_the_same_data(key, data):
    want = fold_in(torch.tensor(key), torch.tensor(data))
    assert torch.equal(fold_in(torch.tensor(key), data), want)


@pytest.mark.parametrize("data", range(4))
def test_small_integers_such_as_a_layer(data):
    keys = fold_in(torch.arange(3), data)
    assert torch.equal(keys, fold_in(torch.arange(3), torch.tensor(data)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_the_width_of_the_data_does_not_matter(dtype):
    data = torch.arange(5)
    assert torch.equal(fold_in(key_of(), data.to(dtype)), fold_in(key_of(), data))


@given(INTEGERS, INTEGERS)
def test_key_and_data_are_not_exchangeable(a, b):
    x, y = torch.tensor(a), torch.tensor(b)
    assert (a == b) or fold_in(x, y) != fold_in(y, x)


def test_keys_broadcast():
    keys, index = torch.arange(3), torch.arange(4)
    table = fold_in(keys[:, None], index)
    for i, j in itertools.product(range(3), range(4)):
        assert table[i, j] == fold_in(keys[i], index[j])


def test_one_bit_of_the_data_changes_half_of_the_key():
    data = torch.arange(2000)
    flips = fold_in(key_of(), data) ^ fold_in(key_of(), data ^ 1)
    bits = torch.stack([(flips >> b) & 1 for b in range(64)]).double().mean(1)
    assert (bits - 0.5).abs().max() < 0.06


# --- numbers ------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62])
def test_numbers_are_uniform(seed):
    numbers = uniform(key_of(seed), (100_000,))
    assert numbers.dtype == torch.float32
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    assert_uniform(numbers)


def test_pairs_of_numbers_are_uniform_in_the_square():
    """Neighbours in one stream, and the same place in neighbouring streams."""
    one_stream = uniform(key_of(), (100_000,))
    keys = fold_in(key_of(), torch.arange(100_000))
    streams = uniform(keys, (1,))[:, 0]
    for numbers in (one_stream, streams):
        a, b = numbers[:-1], numbers[1:]
        cell = (a * 8).floor() * 8 + (b * 8).floor()
        assert_uniform(cell / 64 + 1 / 128)
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.02


def test_numbers_of_a_key_and_of_its_children_are_not_related():
    key = key_of(5)
    own, children = (
        uniform(key, (1000,)),
        uniform(fold_in(key, torch.arange(1000)), (1,)),
    )
    pair = torch.stack([own, children[:, 0]])
    assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.15
    shared = set(own.tolist()) & set(children[:, 0].tolist())
    assert len(shared) < 5  # 1000 * 1000 / 2**24 is 0.06


@pytest.mark.parametrize("shape", [(), (0, 3), (4,), (2, 3)])
@pytest.mark.parametrize("key_shape", [(), (5,), (0,)])
def test_shapes(shape, key_shape):
    keys = torch.zeros(key_shape, dtype=torch.int64)
    assert uniform(keys, shape).shape == (*key_shape, *shape)
    assert uniform(keys, torch.Size(shape)).shape == (*key_shape, *shape)


def test_a_row_depends_on_its_own_key_only():
    keys = fold_in(key_of(), torch.arange(6))
    whole = uniform(keys, (3, 2))
    assert torch.equal(whole[2:4], uniform(keys[2:4], (3, 2)))


# --- dropout ------------------------------------------------------------------


def test_dropout_keeps_the_mean():
    x = torch.ones(100_000)
    y = dropout(key_of(), x, 0.3)
    kept = y != 0
    assert abs(float(kept.double().mean()) - 0.7) < 0.01
    torch.testing.assert_close(y[kept], x[kept] / 0.7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_dropout_keeps_the_dtype_and_the_mask(dtype):
    y = dropout(key_of(), torch.ones(64, dtype=dtype), 0.5)
    assert y.dtype == dtype
    want = dropout(key_of(), torch.ones(64, dtype=F64), 0.5)
    assert torch.equal(y.to(F64), want)


def test_dropout_is_differentiated_through_its_mask():
    x = torch.ones(64)
    y = dropout(key_of(), x, 0.5)
    _, grad = zf.value_and_grad(lambda x: dropout(key_of(), x, 0.5).sum())(x)
    assert torch.equal(grad, y)


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_rates_that_are_none(rate):
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
        dropout(key_of(), torch.ones(2), rate)


def test_keys_that_do_not_fit_the_samples():
    with pytest.raises(ValueError, match="give one key per sample"):
        dropout(torch.zeros(3, dtype=torch.int64), torch.ones(2, 3), 0.5)


# --- on every mesh ------------------------------------------------------------


def masks(params, batch, key):
    """A loss whose gradient by row i is the dropout mask of the global sample i."""
    rows = params[batch["index"]]
    return zf.Mean(dropout(key, rows, 0.5).sum(), torch.tensor(1.0, dtype=F64))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_masks_do_not_depend_on_the_mesh(ranks, zero, num_microbatches):
    params = torch.ones(SAMPLES, 5, dtype=F64)
    batch = {"index": torch.arange(SAMPLES)}
    want = reference(masks, params, batch)
    assert (want.grads == 0).any()
    got = on_mesh(
        masks, params, batch, zf.accumulate(num_microbatches), zero=zero, ranks=ranks
    )
    total = ranks * num_microbatches  # every microbatch of every rank weighs 1
    assert torch.equal(got.grads * total, want.grads)


def test_masks_change_from_step_to_step_and_from_seed_to_seed():
    params = torch.ones(SAMPLES, 5, dtype=F64)
    batch = {"index": torch.arange(SAMPLES)}
    step = zf.train_step(masks, zf.optim.sgd(0.0))
    first = step(zf.shard(params, alone()), batch)
    second = step(first, batch)
    other = step(zf.shard(params, alone(), key=1), batch)
    again = step(zf.shard(params, alone()), batch)
    assert torch.equal(first.grads.buffer, again.grads.buffer)
    assert not torch.equal(first.grads.buffer, second.grads.buffer)
    assert not torch.equal(first.grads.buffer, other.grads.buffer)
