# SPDX-License-Identifier: Apache-2.0
"""deterministic=True: the same parameters, bit for bit, on any number of ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from zfunc.core.errors import PlacementError
from zfunc.optim.norms import tree_ordered_norm
from zfunc.testing import simulate

SHARDS = 4
SHAPES = {"w": (5, 33), "b": (33,), "s": (), "e": (0, 2), "row": (1, 7)}
OPTIMIZERS = {
    "sgd": lambda: zf.optim.sgd(0.1, momentum=0.9),
    "clip and adamw": lambda: zf.optim.chain(
        zf.optim.clip_by_global_norm(0.1, deterministic=True), zf.optim.adamw(0.1)
    ),
}


def loss(params, batch):
    x = batch["x"].to(params["w"].dtype)
    hidden = torch.tanh(x @ params["w"] + params["b"])
    rest = params["row"].square().sum() * params["s"]
    total = (hidden.square().sum(1) * batch["weight"]).sum() + rest
    return zf.Mean(total, batch["weight"].sum())


def params_of(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (scale * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in SHAPES.items()
    }


def batches_of(ranks, count=3):
    """The same 8 samples for all, in pieces of one per rank."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(8, 5, generator=generator)
        weight = torch.rand(8, generator=generator)
        yield {"x": x.view(ranks, -1, 5), "weight": weight.view(ranks, -1)}


def trained(ranks, tx, zero, microbatches=1, dtype=torch.float32, **options):
    pieces = zf.partition(zero=zero, **options)
    step = zf.train_step(loss, tx, zf.accumulate(microbatches), pieces)
    sim = simulate(step, {"data": ranks})
    spec = zf.P() if zero == 0 else zf.P("data")
    state = sim.shard(params_of(dtype), tx=tx, spec=spec)
    for batch in batches_of(ranks):
        state = sim(state, batch)
    full = sim.unshard(state)
    return zf.tree_leaves((full.params, full.moments, full.grads, full.metrics.loss))


def same_bits(a, b):
    return all(map(torch.equal, a, b))


NAMES = st.sampled_from(sorted(OPTIMIZERS))
STAGES = st.sampled_from([0, 1])
PLACES = st.sampled_from([(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def check(name, zero, place, dtype):
    """On some ranks with some microbatches as on one with none."""
    tx, (ranks, microbatches) = OPTIMIZERS[name](), place
    how = {"dtype": dtype, "deterministic": True, "virtual_shards": SHARDS}
    alone = trained(1, tx, 0, **how)
    assert same_bits(trained(ranks, tx, zero, microbatches, **how), alone)


@given(name=NAMES, zero=STAGES, place=PLACES, dtype=DTYPES)
@settings(max_examples=16)
def test_the_same_bits_on_1_2_and_4_ranks(name, zero, place, dtype):
    check(name, zero, place, dtype)


def test_without_it_the_bits_differ():
    """The law is not empty: these sums are not exact."""
    tx = OPTIMIZERS["sgd"]()
    assert not same_bits(trained(4, tx, 1), trained(1, tx, 1))


def test_a_norm_by_pieces_is_noticed():
    """A clip with the usual norm is refused; its bits do differ."""
    x = torch.randn(20, 3, 1001, generator=torch.Generator().manual_seed(0)).square()
    assert any(sum(row.sum() for row in rows) != rows.sum() for rows in x)
    tx = zf.optim.chain(zf.optim.clip_by_global_norm(1.0), zf.optim.sgd(0.1))
    with pytest.raises(ValueError, match=r"clip_by_global_norm\(c, deterministic=True"):
        zf.train_step(loss, tx, zf.partition(zero=1, deterministic=True))


@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@settings(max_examples=40)
def test_the_norm_is_a_norm(shape, dtype):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    want = zf.global_norm({"a": x.double(), "b": x.double() * 2})
    got = tree_ordered_norm({"a": x, "b": x * 2})
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=0.0)


WRONG = {
    "stage 3": (
        lambda: zf.partition(zero=3, deterministic=True),
        ValueError,
        "which zero=3 does not: use zero=1, which keeps the same state",
    ),
    "rounded sums": (
        lambda: zf.partition(zero=1, deterministic=True, reduce_dtype=torch.bfloat16),
        ValueError,
        "leave reduce_dtype out",
    ),
    "six": (
        lambda: zf.partition(zero=1, deterministic=True, virtual_shards=6),
        ValueError,
        "virtual_shards is a power of two; got 6",
    ),
    "shards alone": (
        lambda: zf.partition(zero=1, virtual_shards=8),
        ValueError,
        "virtual_shards is for deterministic=True",
    ),
    "a word": (
        lambda: zf.partition(zero=1, deterministic="yes"),
        TypeError,
        "deterministic is a bool; got 'yes'",
    ),
    "too many parts": (
        lambda: trained(
            4, zf.optim.sgd(0.1), 1, 2, deterministic=True, virtual_shards=4
        ),
        PlacementError,
        r"4 ranks with accumulate\(2\) do not divide virtual_shards=4",
    ),
    "too few samples": (
        lambda: trained(2, zf.optim.sgd(0.1), 1, deterministic=True, virtual_shards=16),
        ValueError,
        r"into 8 equal ones, but batch\['(x|weight)'\] has 4 samples",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_messages(name):
    make, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        make()
