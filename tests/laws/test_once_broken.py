# SPDX-License-Identifier: Apache-2.0
"""Where a law was false once: what random trees, recipes and meshes do not draw."""

import pytest
import torch

import zfunc as zf
from zfunc.optim import GradientTransformation
from zfunc.testing import simulate

PARAMS = {"w": torch.linspace(-1.3, 1.1, 15).reshape(5, 3)}
BATCH = torch.linspace(-2.0, 2.0, 60).reshape(3, 4, 5)


def gradient(loss_fn, *transforms, **options):
    step = zf.train_step(loss_fn, zf.optim.sgd(0.1), *transforms)
    sim = simulate(step, {"data": 3})
    return sim.unshard(sim(sim.shard(PARAMS, **options), BATCH)).grads["w"]


# --- L1: what is accumulated is what the batch at once gives ---------------------


def test_l1_a_bfloat16_output_does_not_change_the_count():
    def loss_fn(params, batch):
        return zf.Mean((params["w"] * batch).sum(), torch.tensor(float(len(batch))))

    state = zf.shard({"w": torch.ones(())}, zf.make_mesh({}))
    policy = zf.Policy.parse("compute=bf16,output=bf16")
    for count in (1, 300, 600):
        transforms = (zf.precision(policy), zf.accumulate(count))
        step = zf.train_step(loss_fn, zf.optim.sgd(0.1), *transforms)
        assert step(state, torch.ones(600)).grads["w"].buffer == 1.0


# --- L3: the stages agree bit for bit --------------------------------------------


def test_l3_a_cast_that_rounds_is_not_forgotten():
    def loss_fn(params, batch):
        rounded = params["w"].to(torch.bfloat16).to(torch.float32)
        return torch.tanh(batch @ rounded).square().mean()

    one, three = (gradient(loss_fn, zf.partition(z)) for z in (1, 3))
    assert torch.allclose(three, one, rtol=1e-5, atol=0.0)


def test_l3_precision_is_not_escaped_by_a_cast():
    def loss_fn(params, batch):
        return torch.tanh(batch.float() @ params["w"].float()).square().mean()

    one, three = (
        gradient(loss_fn, zf.partition(z), zf.precision("bf16")) for z in (1, 3)
    )
    assert torch.allclose(three, one, rtol=1e-5, atol=0.0)


def test_l3_a_cast_that_does_nothing_changes_no_bit():
    def loss_fn(params, batch):
        same = params["w"].float()
        return torch.tanh(batch @ same).square().mean() + params["w"].pow(3).sum()

    one, three = (gradient(loss_fn, zf.partition(z)) for z in (1, 3))
    assert torch.equal(one, three)


def test_l3_one_microbatch_of_a_bfloat16_state():
    def loss_fn(params, batch):
        return torch.tanh(batch.bfloat16() @ params["w"]).float().square().mean()

    one, three = (
        gradient(loss_fn, zf.partition(z), zf.accumulate(1), dtype=torch.bfloat16)
        for z in (1, 3)
    )
    assert torch.equal(one, three)


def test_l2_gradients_keep_the_dtype_of_the_state():
    def loss_fn(params, batch):
        return torch.tanh(batch.bfloat16() @ params["w"]).float().square().mean()

    plain = gradient(loss_fn, zf.partition(1), dtype=torch.bfloat16)
    counted = gradient(loss_fn, zf.partition(1), zf.accumulate(2), dtype=torch.bfloat16)
    assert plain.dtype == counted.dtype


@pytest.mark.parametrize("inner", [zf.value_and_grad, torch.func.grad_and_value])
def test_l3_a_loss_may_differentiate_by_its_parameters(inner):
    def loss_fn(params, batch):
        def energy(w):
            return torch.tanh(batch @ w).mean()

        w = params["w"] if inner is zf.value_and_grad else params["w"].clone()
        return sum(x.square().sum() for x in inner(energy)(w))

    one, three = (gradient(loss_fn, zf.partition(z)) for z in (1, 3))
    assert torch.allclose(one, three)


def test_l3_a_loss_may_map_over_its_parameters():
    def loss_fn(params, batch):
        rows = torch.vmap(lambda row, x: torch.tanh(x.unsqueeze(-1) * row).sum())
        return rows(params["w"].clone(), batch.movedim(-1, 0)).square().mean()

    one, three = (gradient(loss_fn, zf.partition(z)) for z in (1, 3))
    assert torch.allclose(one, three)


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.func.grad(torch.sum)(w).sum(),
        lambda w: torch.vmap(torch.sum)(w).sum(),
    ],
)
def test_a_use_that_would_lose_the_gradient_is_refused(use):
    with pytest.raises(zf.PlacementError, match=r"pass w\.clone\(\)"):
        gradient(lambda params, batch: use(params["w"]), zf.partition(3))


# --- L7: donate(step) == step, and only what was given is consumed ---------------


def summed(params, batch):
    return params["w"].sum()


@pytest.mark.parametrize(
    "taken",
    [
        lambda state: zf.unshard(state).params["w"],
        lambda state: zf.tree_map(lambda x: x, state).params["w"].buffer,
    ],
)
def test_l7_what_was_taken_before_the_donation_survives(taken):
    state = zf.shard(PARAMS, zf.make_mesh({"data": 1}))
    before = taken(state)
    zf.donate(zf.train_step(summed, zf.optim.sgd(0.1), zf.partition(1)))(state, ())
    assert torch.equal(before, PARAMS["w"])


def test_l7_moments_that_start_as_the_parameters():
    anchor = GradientTransformation(
        lambda params: zf.tree_map(lambda p: p, params),
        lambda updates, moments, params: (updates, moments),
    )
    tx = zf.optim.chain(anchor, zf.optim.sgd(0.1))
    step = zf.train_step(summed, tx)
    states = [zf.shard(PARAMS, zf.make_mesh({}), tx=tx) for _ in range(2)]
    pure, donated = step(states[0], ()), zf.donate(step)(states[1], ())
    assert torch.equal(donated.moments[0]["w"].buffer, pure.moments[0]["w"].buffer)


def test_l7_a_batch_that_is_refused_costs_nothing():
    state = zf.shard(PARAMS, zf.make_mesh({}))
    step = zf.donate(zf.train_step(summed, zf.optim.sgd(0.1), zf.accumulate(2)))
    with pytest.raises(ValueError, match="does not divide"):
        step(state, torch.ones(3))
    step(state, torch.ones(4))


# --- the rest --------------------------------------------------------------------


def test_a_key_goes_where_it_is_named():
    def loss_fn(params, batch, scale=2.0, key=None):
        return params["w"].sum() * scale + key.sum() * 0

    state = zf.shard(PARAMS, zf.make_mesh({}))
    after = zf.train_step(loss_fn, zf.optim.sgd(0.1))(state, torch.ones(4))
    assert torch.equal(after.grads["w"].buffer, torch.full((5, 3), 2.0))


def test_all_to_all_counts_dims_from_the_end():
    mesh = zf.make_mesh({"data": 1})
    x = torch.arange(6).reshape(2, 3)
    y = zf.all_to_all(x, "data", mesh, split_dim=-1, concat_dim=0)
    assert torch.equal(y, zf.all_to_all(x, "data", mesh, split_dim=1, concat_dim=0))


def test_a_state_of_no_leaves_is_refused_in_words():
    with pytest.raises((TypeError, zf.ZfuncError), match="leaves"):
        zf.shard({}, zf.make_mesh({}))
