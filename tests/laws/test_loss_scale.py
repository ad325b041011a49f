# SPDX-License-Identifier: Apache-2.0
"""Laws of loss scales, on any mesh: a power of two is invisible, an overflow is too.

In float64, so that nothing but the law decides.
"""

import functools
import math

from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws.cases import assert_bitwise, cases, examples
from zfunc.core.tree import map_with_path, tree_flatten, tree_unflatten
from zfunc.testing import lockstep, simulate

POWERS = st.integers(0, 100)


def scaled(case, scale):
    """The recipe's step with a loss scale."""
    return zf.precision("compute=f64,output=f64", loss_scale=scale)(case.recipe.step())


def trained(case, step, batches=None, state=None):
    sim = simulate(step, case.mesh_shape)
    start = case.shard() if state is None else state
    return functools.reduce(sim, case.split() if batches is None else batches, start)


def spoiled(case, at):
    """The batches, with the one at ``at`` twice: first with samples of infinity."""
    batches = case.split()
    bad = map_with_path(
        lambda path, x: x * math.inf if path == "scale" else x, batches[at]
    )
    return [*batches[:at], bad, *batches[at:]]


def check_power(case, power):
    plain = zf.precision("compute=f64,output=f64")(case.recipe.step())
    want = trained(case, plain)
    got = trained(case, scaled(case, 2.0**power))
    assert_bitwise(got.replace(loss_scale=None), want, f"a scale of 2**{power}")


def check_skipped(case, at):
    """Parameters and moments are those of a run that was not given the bad batch."""
    if not any(x.numel() for x in zf.tree_leaves(case.params)):
        return  # no gradients, no overflow
    rule = zf.DynamicLossScale(initial_scale_power=3, hysteresis=1)
    step = scaled(case, rule)
    want = trained(case, step)
    got = trained(case, step, spoiled(case, at))
    for field in ("params", "moments", "key"):
        assert_bitwise(getattr(got, field), getattr(want, field), field)
    assert set(got.loss_scale.skipped_steps.tolist()) == {1}
    assert set((want.loss_scale.scale / got.loss_scale.scale).tolist()) == {2.0}


def check_resumed(case, at, cut):
    """The scale is part of the state, and all that is needed to go on."""
    step = scaled(case, zf.DynamicLossScale(initial_scale_power=3, loss_scale_window=1))
    batches = spoiled(case, at)
    whole = trained(case, step, batches)
    leaves, spec = tree_flatten(trained(case, step, batches[:cut]))
    copy = tree_unflatten(spec, [leaf.clone() for leaf in leaves])
    assert_bitwise(trained(case, step, batches[cut:], copy), whole, "resumed")


# Sums over samples that overflow in one place only: a loss with a scale per batch.
SCALED_BATCHES = cases(num_steps=2, remat=False, weighted=False)


@examples(0.3)
@given(cases(), POWERS)
def test_a_power_of_two_changes_no_bit(case, power):
    check_power(case, power)


@examples(0.3)
@given(SCALED_BATCHES, st.integers(0, 1))
def test_a_step_that_overflows_is_no_step(case, at):
    check_skipped(case, at)


@examples(0.15)
@given(SCALED_BATCHES, st.integers(0, 1), st.integers(0, 3))
def test_resuming_with_a_scale(case, at, cut):
    check_resumed(case, at, cut)


@examples(0.1)
@given(cases(num_steps=1, mesh_shapes=st.just({"data": 2})), POWERS)
def test_jitted_is_eager_on_two_ranks(case, power):
    step = scaled(case, 2.0**power)
    run = lockstep(step, case.mesh_shape, zf.jit(step)._passes)
    start = trained(case, step, case.split())  # a state that has a scale
    batch = case.split()[0]
    assert_bitwise(run(start, batch), trained(case, step, [batch], start), "jitted")
