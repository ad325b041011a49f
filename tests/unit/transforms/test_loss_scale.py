# SPDX-License-Identifier: Apache-2.0
"""Loss scales: DeepSpeed's rule, and steps that overflow and change nothing."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from zfunc.testing import simulate

TX = zf.optim.chain(
    zf.optim.clip_by_global_norm(1.0),
    zf.optim.adamw(zf.optim.warmup_linear(0.1, 3, 20)),
)


def deepspeed_scales(overflows, power, window, hysteresis, consecutive, smallest):
    """The scale before each step, by the state machine of DeepSpeed's ZeRO stages.

    Written from its description: an iteration counter, the last overflow's iteration
    and what is left of the hysteresis. An overflow at the smallest scale raises there;
    here the scale stays.
    """
    scale, left, last = 2.0**power, hysteresis, -1
    for step, overflow in enumerate(overflows):
        yield scale
        if overflow:
            if hysteresis == 1 or left == 1:
                scale = max(scale / 2, smallest)
            else:
                left -= 1
            last = step
        else:
            if consecutive:
                left = hysteresis
            stable = step - last - 1
            if stable > 0 and stable % window == 0:
                if not consecutive:
                    left = hysteresis
                scale = min(scale * 2, 2.0**100)


def our_scales(overflows, rule):
    state = rule.init(torch.ones(1))
    for overflow in overflows:
        yield float(state.scale)
        state = rule.adjusted(state, torch.tensor(not overflow))
    assert int(state.skipped_steps) == sum(overflows)


def test_3000_sequences_of_overflows_give_deepspeeds_scales():
    draw = random.Random(0)
    for _ in range(3000):
        rate = draw.choice([0.02, 0.1, 0.5, 0.9])
        overflows = [draw.random() < rate for _ in range(draw.randint(1, 25))]
        power, window = draw.randint(1, 20), draw.randint(1, 6)
        hysteresis, consecutive = draw.randint(1, 4), draw.random() < 0.5
        smallest = 2.0 ** draw.randint(0, power)
        given = (power, window, hysteresis, consecutive, smallest)
        rule = zf.DynamicLossScale(*given)
        want = list(deepspeed_scales(overflows, *given))
        assert list(our_scales(overflows, rule)) == want, (given, overflows)


def test_the_first_growth_comes_after_window_and_one_steps():
    rule = zf.DynamicLossScale(initial_scale_power=3, loss_scale_window=4)
    assert list(our_scales([False] * 11, rule)) == [8.0] * 5 + [16.0] * 4 + [32.0] * 2


def test_a_scale_does_not_grow_to_infinity():
    rule = zf.DynamicLossScale(initial_scale_power=99, loss_scale_window=1)
    assert list(our_scales([False] * 6, rule))[-1] == 2.0**100


def test_a_static_scale_stays():
    rule = zf.StaticLossScale(96.0)
    assert set(our_scales([True, False, True], rule)) == {96.0}


def loss(params, batch):
    return ((batch @ params["w"]) ** 2).mean() + params["b"].sum()


def state_of(mesh, zero, dtype=torch.float32):
    params = {"w": torch.ones(3, 2, dtype=dtype), "b": torch.ones(1, dtype=dtype)}
    return zf.shard(params, mesh, tx=TX, spec=zf.P() if zero == 0 else None)


def leaves(state):
    """What a skipped step may not change."""
    return zf.tree_leaves((state.params, state.moments, state.key))


def steps_of(zero, *transforms):
    pure = zf.train_step(loss, TX, zf.partition(zero=zero), *transforms)
    return {
        "pure": pure,
        "donate": zf.donate(pure),
        "jit": zf.jit(pure, donate=False),
        "jit donate": zf.jit(pure),
    }


@pytest.mark.parametrize("kind", ["pure", "donate", "jit", "jit donate"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_that_is_not_finite_changes_nothing(kind, bad):
    step = steps_of(3, zf.precision("fp32", loss_scale="dynamic"), zf.accumulate(2))
    state = state_of(zf.make_mesh({"data": 1}), 3)
    batch = torch.ones(4, 3)
    state = step[kind](state, batch)
    before = [x.clone() for x in leaves(state)]
    state = step[kind](state, torch.full((4, 3), bad))
    assert all(map(torch.equal, leaves(state), before))
    assert int(state.metrics.skipped) == int(state.loss_scale.skipped_steps) == 1
    assert int(state.step) == 2
    state = step[kind](state, batch)
    assert int(state.metrics.skipped) == 0
    assert not any(map(torch.equal, zf.tree_leaves(state.params), before))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_overflow_on_one_rank_stops_all(zero):
    """In float16 with a loss that one rank's data takes over its largest number."""
    policy = zf.precision("fp16", loss_scale=4.0)
    step = simulate(
        zf.train_step(loss, TX, zf.partition(zero=zero), policy), {"data": 3}
    )
    params = {"w": torch.ones(3, 2), "b": torch.ones(1)}
    state = step.shard(params, tx=TX, spec=zf.P() if zero == 0 else None)
    before = step(state, torch.ones(3, 2, 3))
    assert before.metrics.skipped.tolist() == [0, 0, 0]
    sizes = torch.tensor([1.0, 300.0, 1.0]).view(3, 1, 1)
    after = step(before, torch.ones(3, 2, 3) * sizes)
    assert all(map(torch.equal, leaves(before), leaves(after)))
    assert after.metrics.skipped.tolist() == [1, 1, 1]


@given(
    power=st.integers(0, 20),
    zero=st.integers(0, 3),
    microbatches=st.sampled_from([1, 2]),
)
@settings(max_examples=12)
def test_a_power_of_two_changes_no_bit(power, zero, microbatches):
    mesh, batch = zf.make_mesh({"data": 1}), torch.randn(4, 3)
    plain, scaled = (
        zf.train_step(
            loss,
            TX,
            zf.partition(zero=zero),
            zf.precision("fp32", loss_scale=scale),
            zf.accumulate(microbatches),
        )
        for scale in (None, 2.0**power)
    )
    one, two = state_of(mesh, zero), state_of(mesh, zero)
    for _ in range(3):
        one, two = plain(one, batch), scaled(two, batch)
    pairs = zip(leaves(one), leaves(two), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(one.grads["w"].buffer, two.grads["w"].buffer)


def test_small_gradients_of_float16_need_the_scale():
    """1e-8 is 0 in float16; with a scale of 2**15 it is not."""

    def tiny(params, batch):
        return (params["w"] * batch * 1e-4).sum() * 1e-4

    def gradient(scale):
        policy = zf.precision("fp16", loss_scale=scale)
        step = zf.train_step(tiny, zf.optim.sgd(1.0), policy)
        state = zf.shard({"w": torch.ones(2)}, zf.make_mesh({}))
        return step(state, torch.ones(2)).grads["w"].buffer

    assert torch.equal(gradient(1.0), torch.zeros(2))
    torch.testing.assert_close(
        gradient(2.0**15), torch.full((2,), 1e-8), rtol=2e-3, atol=0.0
    )


def test_bfloat16_can_skip_without_a_scale():
    step = zf.train_step(loss, TX, zf.precision("bf16"), zf.skip_nonfinite())
    state = state_of(zf.make_mesh({}), 0)
    after = step(state, torch.full((2, 3), math.nan))
    assert all(map(torch.equal, leaves(after)[:2], leaves(state)[:2]))
    assert int(after.metrics.skipped) == 1


def test_skip_nonfinite_leaves_a_scale_alone():
    rule = zf.DynamicLossScale(initial_scale_power=5)
    for transforms in (
        (zf.skip_nonfinite(), zf.precision("fp16", loss_scale=rule)),
        (zf.precision("fp16", loss_scale=rule), zf.skip_nonfinite()),
    ):
        assert zf.train_step(loss, TX, *transforms).scaling is rule


def test_without_a_rule_nothing_is_skipped_or_counted():
    step = zf.train_step(loss, TX)
    state = step(state_of(zf.make_mesh({}), 0), torch.full((2, 3), math.nan))
    assert state.loss_scale is None
    assert int(state.metrics.skipped) == 0
    assert bool(state.params["w"].buffer.isnan().any())


RULES = {
    "static": zf.StaticLossScale(4.0),
    "none": zf.StaticLossScale(1.0),
    "dynamic": zf.DynamicLossScale(initial_scale_power=4, hysteresis=3),
    "quick": zf.DynamicLossScale(initial_scale_power=6, hysteresis=1),
}


@pytest.mark.parametrize("before", RULES)
@pytest.mark.parametrize("after", RULES)
def test_a_new_rule_holds_whatever_was_before(before, after):
    """It starts where it says, or goes on; dynamic ones get down to the smallest."""
    old, new, bad = RULES[before], RULES[after], torch.tensor(False)
    state = old.adjusted(old.entered(old.init(torch.ones(1))), bad)
    first = new.entered(state)
    if isinstance(new, zf.StaticLossScale):
        assert float(first.scale) == new.scale
        return
    if isinstance(old, zf.StaticLossScale):
        assert float(first.scale) == 2.0**new.initial_scale_power
    else:
        assert first.scale == state.scale
    for _ in range(12):
        state = new.adjusted(new.entered(state), bad)
    assert float(state.scale) == new.min_loss_scale
    assert int(state.skipped_steps) == 13
