# SPDX-License-Identifier: Apache-2.0
"""L5: ``accumulate(a)`` and ``accumulate(b)`` are ``accumulate(a * b)``."""

import functools

from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws.cases import assert_bitwise, cases, examples
from tests.laws.test_l1_commuting_square import exact_loss
from zfunc.testing import differences, random_batch, simulate, split_batch


def steps(case, a, b, loss_fn):
    """``accumulate(ab)`` and ``accumulate(a) . accumulate(b)`` after one step each."""
    ranks = case.mesh_shape["data"]
    batch = random_batch(2 * a * b * ranks, seed=a + 7 * b)
    split = split_batch(batch, case.mesh_shape)
    one_microbatch = case.but(num_microbatches=1)
    where = one_microbatch.recipe.transforms()
    results = []
    for counts in ((a * b,), (a, b)):
        transforms = (*where, *map(zf.accumulate, counts))
        step = zf.train_step(loss_fn, case.recipe.tx(), *transforms)
        state = simulate(step, case.mesh_shape)(case.shard(), split)
        results.append(case.unshard(state))
    return results


def check(case, a, b):
    flat, nested = steps(case, a, b, case.recipe.loss())
    if 1 in (a, b):
        assert_bitwise(nested, flat, f"accumulate({a}) . accumulate({b})")
    # The sums are bracketed otherwise: the tolerance of L1.
    wrong = differences(nested, flat, rtol=1e-9, atol=1e-12)
    assert not wrong, f"accumulate({a}) . accumulate({b}): {wrong[0]}"


def check_exact(case, a, b):
    flat, nested = steps(case.but(clip=None), a, b, exact_loss)
    assert_bitwise(nested.grads, flat.grads, f"accumulate({a}) . accumulate({b})")
    assert_bitwise(nested.params, flat.params, f"accumulate({a}) . accumulate({b})")


COUNTS = st.integers(1, 3)


@examples(0.5)
@given(cases(num_steps=1), COUNTS, COUNTS)
def test_nesting_multiplies(case, a, b):
    check(case, a, b)


@examples(0.5)
@given(cases(num_steps=1), COUNTS, COUNTS)
def test_bitwise_where_sums_are_exact(case, a, b):
    check_exact(case, a, b)


@examples(0.5)
@given(cases(num_steps=1, num_microbatches=st.integers(2, 3)))
def test_microbatches_are_the_whole_batch(case):
    whole = case.but(num_microbatches=1)
    got, want = case.unshard(case.train()), case.unshard(whole.train())
    assert not differences(got, want, rtol=1e-9, atol=1e-12)


def test_orders_of_nesting_are_named():
    step = functools.reduce(
        lambda s, t: t(s),
        (zf.accumulate(2), zf.accumulate(3)),
        zf.train_step(lambda p, b: p.sum(), zf.optim.sgd(0.1)),
    )
    assert repr(step).endswith("accumulate=keep . accumulate(2) . accumulate(3)>")
