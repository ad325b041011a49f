# SPDX-License-Identifier: Apache-2.0
"""Schedule-free AdamW against algorithm 1 of its paper, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.optim import leafwise
from zfunc.core.errors import StructureError
from zfunc.core.tree import tree_map
from zfunc.optim import (
    adamw,
    add_decayed_weights,
    apply_updates,
    chain,
    decay_matrices,
    schedule_free,
    schedule_free_adamw,
    schedule_free_params,
    warmup_linear,
)

TXS = {
    "adamw": schedule_free_adamw(0.1, weight_decay=0.1, warmup_steps=3),
    "scheduled": schedule_free_adamw(
        warmup_linear(0.1, 2, 5), weight_decay=0.1, mask=decay_matrices
    ),
    "no eps": schedule_free_adamw(0.1, eps=0.0),
    "descent": schedule_free(0.1, b1=0.5),
}


def papers(gamma, b1, b2, eps, decay, warmup, decays=lambda p: True):
    """Defazio et al., algorithm 1, line by line: the y and x after each step."""
    x = leafwise.start()
    z, ys, xs = dict(x), [], []
    v = {k: torch.zeros_like(p) for k, p in x.items()}
    total = 0.0
    for t in range(1, leafwise.STEPS + 1):
        rate = gamma(t) * (1 - b2**t) ** 0.5 * (min(1, t / warmup) if warmup else 1)
        total += rate**2
        c = rate**2 / total if total else 0.0
        for k in x:
            y = (1 - b1) * z[k] + b1 * x[k]
            g = leafwise.gradient(y, t - 1)
            v[k] = b2 * v[k] + (1 - b2) * g**2
            step = g / (v[k].sqrt() + eps) + (decay if decays(y) else 0.0) * y
            z[k] = z[k] - rate * step
            x[k] = (1 - c) * x[k] + c * z[k]
        ys.append({k: (1 - b1) * z[k] + b1 * x[k] for k in x})
        xs.append(dict(x))
    return ys, xs


def state_of(tx, params, moments):
    made = zf.shard(params, zf.make_mesh({}))
    return zf.unshard(made).replace(moments=moments)


def averages(tx):
    """The x after each step, as the user gets them."""
    params = leafwise.start()
    moments, path = tx.init(params), []
    for step in range(leafwise.STEPS):
        grads = {k: leafwise.gradient(p, step) for k, p in params.items()}
        updates, moments = tx.update(grads, moments, params)
        params = apply_updates(params, updates)
        path.append(schedule_free_params(state_of(tx, params, moments)))
    return path


def check(tx, *reference, **options):
    ys, xs = papers(*reference, **options)
    leafwise.assert_same(leafwise.trajectory(tx)[0], ys)
    leafwise.assert_same(averages(tx), xs, atol=1e-10)


@settings(max_examples=15)
@given(
    lr=st.floats(0, 0.2),
    b1=st.floats(0.05, 0.99),
    b2=st.floats(0, 0.9999),
    eps=st.floats(1e-10, 1.0),
    weight_decay=st.floats(0, 1),
    warmup_steps=st.integers(0, 12),
)
def test_any_hyper_parameters(lr, b1, b2, eps, weight_decay, warmup_steps):
    tx = schedule_free_adamw(lr, b1, b2, eps, weight_decay, warmup_steps)
    check(tx, lambda t: lr, b1, b2, eps, weight_decay, warmup_steps)


def test_a_schedule_that_starts_at_zero_and_a_mask():
    schedule = warmup_linear(0.2, 3, 50)
    tx = schedule_free_adamw(schedule, weight_decay=0.3, mask=decay_matrices)
    rest = (0.9, 0.999, 1e-8, 0.3, 0, lambda p: p.dim() == 2)
    check(tx, lambda t: float(schedule(t - 1)), *rest)


def test_without_a_rate_nothing_moves():
    for path in (leafwise.trajectory(schedule_free(0.0))[0], averages(TXS["descent"])):
        assert all(x.isfinite().all() for step in path for x in step.values())
    tx = schedule_free_adamw(0.0)
    leafwise.assert_same(leafwise.trajectory(tx, 3)[0], [leafwise.start()] * 3, 0, 0)


def test_the_average_is_the_mean_of_the_steps_weighted_by_squared_rates():
    rates = torch.tensor([0.1, 0.5, 0.2, 0.4], dtype=torch.float64)
    tx, p = schedule_free(lambda step: rates[step], b1=0.7), leafwise.randn(4, seed=0)
    moments, z = tx.init(p), []
    for step in range(4):
        updates, moments = tx.update(leafwise.gradient(p, step), moments, p)
        p = apply_updates(p, updates)
        z.append(moments.z)
    weights = rates.square() / rates.square().sum()
    mean = sum(w * x for w, x in zip(weights, z, strict=True))
    x = schedule_free_params(state_of(tx, p, moments))
    torch.testing.assert_close(x, mean, rtol=1e-12, atol=1e-12)


def test_another_b1_goes_on_from_the_same_y_and_z():
    params, g = leafwise.start(), leafwise.start()
    before, after = schedule_free(0.1, b1=0.9), schedule_free(0.1, b1=0.5)
    updates, moments = before.update(g, before.init(params), params)
    assert moments.b1.item() == 0.9
    _, moments = after.update(g, moments, apply_updates(params, updates))
    assert moments.b1.item() == 0.5


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("b2", [0.0, 0.999])
def test_zero_gradients_move_nothing(b2, eps):
    tx = schedule_free_adamw(0.1, b2=b2, eps=eps)
    leafwise.zero_gradients_move_nothing(tx)


@pytest.mark.parametrize("tx", TXS.values(), ids=TXS)
@pytest.mark.parametrize("owed", leafwise.OWED, ids=lambda f: f.__name__)
def test_what_every_transformation_owes(owed, tx):
    owed(tx)


def test_narrow_parameters_have_a_wide_z():
    params = tree_map(lambda p: p.bfloat16(), leafwise.start())
    tx = schedule_free_adamw(0.1)
    moments = tx.init(params)
    updates, moments = tx.update(params, moments, params)
    assert {z.dtype for z in moments[2].z.values()} == {torch.float32}
    assert {u.dtype for u in updates.values()} == {torch.float32}
    x = schedule_free_params(state_of(tx, apply_updates(params, updates), moments))
    assert {p.dtype for p in x.values()} == {torch.bfloat16}


def test_placed_averages_are_those_of_plain_trees():
    tx = schedule_free_adamw(0.1)
    step = zf.train_step(lambda p, b: (p["w"] * b).square().sum(), tx)
    placed = zf.shard({"w": torch.ones(3)}, zf.make_mesh({"data": 1}), tx=tx)
    for _ in range(3):
        placed = step(placed, torch.arange(3.0))
    x = schedule_free_params(placed)["w"]
    assert x.sharding == placed.params["w"].sharding
    whole = schedule_free_params(zf.unshard(placed))["w"]
    assert torch.equal(x.buffer, whole)
    assert not torch.equal(x.buffer, placed.params["w"].buffer)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: schedule_free_adamw(-0.1), "learning_rate is -0.1"),
        (lambda: schedule_free(0.1, b1=0.0), r"schedule_free: b1 is 0.0, .*\(0, 1\)"),
        (lambda: schedule_free_adamw(0.1, b1=1.0), "b1 is 1.0, .* example b1=0.9"),
        (lambda: schedule_free_adamw(0.1, b2=1.0), "schedule_free_adamw: b2 is 1.0"),
        (lambda: schedule_free_adamw(0.1, eps=-1), "eps is -1"),
        (lambda: schedule_free_adamw(0.1, weight_decay=-1), "weight_decay is -1"),
        (lambda: schedule_free_adamw(0.1, warmup_steps=-1), "warmup_steps is -1"),
    ],
)
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_kinds():
    with pytest.raises(TypeError, match="warmup_steps is a float, expected an int"):
        schedule_free_adamw(0.1, warmup_steps=1.0)
    with pytest.raises(TypeError, match="mask is a dict"):
        schedule_free_adamw(0.1, mask={}, weight_decay=0.1)
    p = torch.ones(2)
    tx = schedule_free_adamw(lambda step: None)
    with pytest.raises(TypeError, match="the learning-rate schedule returned"):
        tx.update(p, tx.init(p), p)


def test_a_state_without_averages():
    state = zf.shard({"w": torch.ones(2)}, zf.make_mesh({}), tx=adamw(0.1))
    wanted = r"has 0 ScheduleFreeMoments .* such as schedule_free_adamw\(3e-4\)"
    with pytest.raises(StructureError, match=wanted):
        schedule_free_params(state)
    with pytest.raises(TypeError, match="takes a TrainState, got a dict"):
        schedule_free_params({"w": torch.ones(2)})


def test_other_moments():
    p = {"w": torch.ones(2)}
    tx = schedule_free(0.1)
    with pytest.raises(StructureError, match="schedule_free: moments"):
        tx.update(p, (), p)
    with pytest.raises(StructureError, match="Pass the gradients of these params"):
        tx.update({"v": torch.ones(2)}, tx.init(p), p)


def test_descent_decays_like_its_parts_say():
    """Any updates may go in: with a decay it is the paper's schedule-free SGD."""
    tx = chain(add_decayed_weights(0.1), schedule_free(0.1, b1=0.5))
    params = leafwise.start()
    updates, _ = tx.update(tree_map(torch.zeros_like, params), tx.init(params), params)
    # c = 1 at the first step: y' = x' = z', the whole step.
    expected = tree_map(lambda p: -0.01 * p, params)
    torch.testing.assert_close(updates, expected, rtol=1e-12, atol=0)
