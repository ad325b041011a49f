# SPDX-License-Identifier: Apache-2.0
"""Policies for bad losses: skip, stop, go back; the same decisions again."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf

TX = zf.optim.adamw(zf.optim.warmup_linear(0.1, 2, 50))


def loss(params, batch):
    return ((params["w"] - batch) ** 2).mean() + params["b"].sum() * 0


STEP = zf.train_step(loss, TX)


def start():
    params = {"b": torch.zeros(2), "w": torch.zeros(3)}
    return zf.Run(zf.shard(params, zf.make_mesh({}), tx=TX))


def batches_of(*values):
    return [torch.full((3,), float(value)) for value in values]


def folded(policy, batches, run=None, step=STEP):
    go_on = zf.recovering(step, policy)
    run = start() if run is None else run
    for batch in batches:
        run = go_on(run, batch)
    return run


def bits(state):
    return [x.tolist() for x in zf.tree_leaves((state.params, state.moments))]


def actions(run):
    return [(d.batch, d.step, d.action) for d in run.decisions]


def trained(*values):
    state = start().state
    for batch in batches_of(*values):
        state = STEP(state, batch)
    return state


def test_a_policy_that_never_acts_changes_nothing():
    policy = zf.Recovery(
        on_nonfinite="rollback",
        on_spike="stop",
        spike_factor=100.0,
        rollback_steps=3,
    )
    run = folded(policy, batches_of(1, 2, 1, 2, 1))
    assert bits(run.state) == bits(trained(1, 2, 1, 2, 1))
    assert run.decisions == ()
    assert (run.num_batches, len(run.past)) == (5, 2)


def test_skip_leaves_parameters_and_schedule_and_goes_on():
    run = folded(zf.Recovery(), batches_of(1, math.nan, 1))
    assert bits(run.state) == bits(trained(1, 1))
    assert actions(run) == [(1, 1, "skip")]
    assert int(run.state.step) == 3
    assert run.past == (), "nothing is kept that is not gone back to"


def test_the_reason_names_loss_leaf_and_rank():
    reason = folded(zf.Recovery(), batches_of(math.nan)).decisions[0].reason
    assert reason == (
        "the loss is nan, the gradient's norm nan; grads['w'] not finite on rank 0"
    )


def test_stop_raises_and_leaves_the_run():
    before = folded(zf.Recovery(on_nonfinite="stop"), batches_of(1, 2))
    with pytest.raises(
        zf.RecoveryError, match=r"step 2: the loss is inf, .*grads\['w'\] not finite on"
    ):
        folded(zf.Recovery(on_nonfinite="stop"), batches_of(math.inf), before)
    assert bits(before.state) == bits(trained(1, 2))


@pytest.mark.parametrize(("back", "kept"), [(1, 4), (2, 3), (4, 1), (5, 0), (9, 0)])
def test_rollback_undoes_k_steps_and_leaves_m_batches_out(back, kept):
    policy = zf.Recovery(on_nonfinite="rollback", rollback_steps=back, skip_batches=2)
    run = folded(policy, batches_of(1, 2, 3, 4, math.nan, 5, 6))
    good = (1, 2, 3, 4)[:kept]
    assert bits(run.state) == bits(trained(*good))
    assert actions(run) == [(4, 4, "rollback"), (5, kept, "pass"), (6, kept, "pass")]
    after = folded(policy, batches_of(7), run)
    assert bits(after.state) == bits(trained(*good, 7))
    assert run.decisions[0].reason.endswith(f"; back to step {kept}")


def test_a_jump_of_the_loss_goes_back():
    policy = zf.Recovery(
        on_spike="rollback", spike_factor=4.0, window=3, rollback_steps=2
    )
    run = folded(policy, batches_of(1, 1, 1, 1, 50, 1))
    assert actions(run) == [(4, 4, "rollback")]
    assert "more than 4 times the median" in run.decisions[0].reason
    assert bits(run.state) == bits(trained(1, 1, 1, 1))


def test_no_jump_before_the_window_is_full():
    policy = zf.Recovery(spike_factor=4.0, window=3, on_spike="stop")
    assert folded(policy, batches_of(1, 1, 50)).decisions == ()


def test_going_back_without_getting_further_ends():
    policy = zf.Recovery(on_nonfinite="rollback", max_rollbacks=2)
    run = folded(policy, batches_of(1, math.nan, math.nan))
    with pytest.raises(zf.RecoveryError, match="went back 2 times without getting any"):
        folded(policy, batches_of(math.nan), run)
    further = folded(policy, batches_of(1, math.nan), run)
    assert further.num_rollbacks == 1


@pytest.mark.parametrize("action", ["skip", "stop"])
def test_a_step_that_skips_itself_leaves_the_rest_to_the_policy(action):
    step = zf.train_step(loss, TX, zf.skip_nonfinite())
    policy = zf.Recovery(on_nonfinite=action)
    run = folded(policy, batches_of(1), step=step)
    if action == "stop":
        with pytest.raises(zf.RecoveryError, match="the loss is nan"):
            folded(policy, batches_of(math.nan), run, step)
        return
    run = folded(policy, batches_of(math.nan, 1), run, step)
    assert actions(run) == [(1, 1, "skip")]
    assert bits(run.state) == bits(trained(1, 1))
    assert int(run.state.loss_scale.skipped_steps) == 1


def test_overflows_are_skipped_while_the_scale_can_fall():
    """Then the policy decides, also where it is as small as it gets."""

    def steep(params, batch):
        return (params["w"] * 1e-20 * 1e22 * batch).sum() + params["b"].sum()

    rule = zf.DynamicLossScale(initial_scale_power=60, hysteresis=2)
    policy = zf.precision("fp32", loss_scale=rule)
    step = zf.train_step(steep, TX, policy)
    run = folded(zf.Recovery(on_nonfinite="stop"), batches_of(*[1] * 14), step=step)
    assert {d.action for d in run.decisions} == {"skip"}
    assert "overflowed; grads['w'] not finite on rank 0" in run.decisions[0].reason
    assert len(run.decisions) < 14, "the scale is small enough at last"
    lowest = zf.DynamicLossScale(60, hysteresis=1, min_loss_scale=2.0**59)
    step = step._replace(scaling=lowest)
    with pytest.raises(zf.RecoveryError, match=r"step 1: .*the gradient's norm"):
        folded(zf.Recovery(on_nonfinite="stop"), batches_of(1, 1, 1), step=step)


def test_negative_losses_jump_upwards():
    def negative(params, batch):
        return batch.mean() + 0 * (params["w"].sum() + params["b"].sum())

    step = zf.train_step(negative, TX)
    policy = zf.Recovery(on_spike="stop", spike_factor=2.0, window=3)
    run = folded(policy, batches_of(-8, -8, -8, -8, -1), step=step)
    assert run.decisions == ()
    with pytest.raises(zf.RecoveryError, match="median -8 of the last 3"):
        folded(policy, batches_of(0.5), run, step)


@given(
    values=st.lists(st.sampled_from([1.0, 2.0, 90.0, math.nan]), max_size=10),
    at=st.integers(0, 10),
    back=st.integers(1, 3),
    left_out=st.integers(0, 2),
)
@settings(max_examples=30)
def test_replay_gives_the_same_decisions(values, at, back, left_out):
    """Also in two halves: a run is a value."""
    policy = zf.Recovery(
        on_nonfinite="rollback",
        on_spike="rollback",
        spike_factor=5.0,
        window=2,
        rollback_steps=back,
        skip_batches=left_out,
        max_rollbacks=100,
    )
    batches = batches_of(*values)
    whole = folded(policy, batches)
    halves = folded(policy, batches[at:], folded(policy, batches[:at]))
    assert whole.decisions == halves.decisions
    assert bits(whole.state) == bits(halves.state)
    assert all(math.isfinite(x) for row in bits(whole.state)[:2] for x in row)


def test_a_jitted_step_must_not_donate():
    for step in (zf.jit(STEP), zf.donate(STEP)):
        with pytest.raises(ValueError, match=r"zf.jit\(step, donate=False\)"):
            folded(zf.Recovery(), batches_of(1), step=step)
    run = folded(
        zf.Recovery(), batches_of(1, math.nan, 1), step=zf.jit(STEP, donate=False)
    )
    assert bits(run.state) == bits(trained(1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite is 'ignore', expected one of skip,"),
        ({"window": 0}, "window is 0, expected an int of at least 1"),
        ({"rollback_steps": True}, "rollback_steps is True, expected an int"),
        (
            {"on_spike": "stop", "spike_factor": 1.0},
            "spike_factor is 1.0, expected a number above 1",
        ),
        ({"spike_factor": 2.0}, "on_spike and spike_factor belong together"),
        ({"on_spike": "stop"}, "on_spike and spike_factor belong together"),
    ],
)
def test_messages(options, message):
    with pytest.raises(ValueError, match=message):
        zf.Recovery(**options)


def test_arguments_of_another_kind():
    with pytest.raises(TypeError, match="the first argument is a step, got Recovery"):
        zf.recovering(zf.Recovery(), STEP)
    with pytest.raises(TypeError, match=r"policy is a zf.Recovery"):
        zf.recovering(STEP, {"on_nonfinite": "stop"})
    with pytest.raises(TypeError, match=r"takes a run, got a TrainState: type zf.Run"):
        zf.recovering(STEP, zf.Recovery())(start().state, batches_of(1)[0])
