# SPDX-License-Identifier: Apache-2.0
"""The average of the parameters against ``torch.optim.swa_utils``, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

import zfunc as zf
from tests.laws.cases import assert_bitwise
from tests.unit.optim import leafwise
from zfunc.core.errors import StructureError
from zfunc.core.tree import tree_map
from zfunc.optim import (
    adamw,
    apply_updates,
    averaged_params,
    chain,
    ema,
    kahan,
    lion,
    sgd,
)
from zfunc.testing import simulate

TXS = {"ema": ema(0.9), "adamw": chain(adamw(0.1), ema(0.5)), "zero": ema(0.0)}


def torchs(decay):
    """AveragedModel, updated before the first step and after each."""
    model = torch.nn.ParameterDict(leafwise.start())
    averaged = AveragedModel(model, avg_fn=get_ema_avg_fn(decay))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    averaged.update_parameters(model)
    path = []
    for step in range(leafwise.STEPS):
        for p in model.values():
            p.grad = leafwise.gradient(p.detach(), step)
        optimizer.step()
        averaged.update_parameters(model)
        path.append({k: p.detach().clone() for k, p in averaged.module.items()})
    return path


@settings(max_examples=15)
@given(decay=st.one_of(st.just(0.0), st.floats(0, 0.9999)))
def test_an_average_of_any_decay(decay):
    tx, params = chain(sgd(0.1, momentum=0.9), ema(decay)), leafwise.start()
    moments, path = tx.init(params), []
    for step in range(leafwise.STEPS):
        grads = {k: leafwise.gradient(p, step) for k, p in params.items()}
        updates, moments = tx.update(grads, moments, params)
        params = apply_updates(params, updates)
        path.append(moments[-1].average)
    leafwise.assert_same(path, torchs(decay))
    if decay == 0:
        leafwise.assert_same(path[-1:], [params], 0, 0)


def test_training_does_not_notice():
    plain, _ = leafwise.trajectory(adamw(0.1))
    noticed, _ = leafwise.trajectory(chain(adamw(0.1), ema(0.9)))
    leafwise.assert_same(noticed, plain, 0, 0)


def test_the_average_is_of_what_is_stored():
    """In bfloat16 the parameters do not move here, so neither does their average."""
    p = torch.tensor([256.0], dtype=torch.bfloat16)
    for tx, moved in ((chain(sgd(1.0), ema(0.0)), 0), (ema(0.0), 0)):
        _, moments = tx.update(torch.tensor([0.5]), tx.init(p), p)
        average = (moments[-1] if isinstance(moments, tuple) else moments).average
        assert average.dtype == torch.float32
        assert average.item() == 256 + moved
    tx = chain(kahan(sgd(1.0)), ema(0.0))
    moments = tx.init(p)
    for _ in range(4):
        updates, moments = tx.update(torch.tensor([-0.5]), moments, p)
        p = apply_updates(p, updates)
    assert moments[-1].average.item() == p.item() == 258


@pytest.mark.parametrize("tx", TXS.values(), ids=TXS)
@pytest.mark.parametrize("owed", leafwise.OWED, ids=lambda f: f.__name__)
def test_what_every_transformation_owes(owed, tx):
    owed(tx)


def test_zero_gradients_move_nothing():
    # Bitwise, which 0.9 a + 0.1 a is not.
    leafwise.zero_gradients_move_nothing(chain(lion(0.1), ema(0.5)))


def trained(mesh_shape, tx, steps=3):
    step = zf.train_step(
        lambda p, b: (p["w"] * b).sum(), tx, *([zf.partition(2)] if mesh_shape else [])
    )
    sim = simulate(step, mesh_shape)
    state = sim.shard({"w": torch.ones(5), "s": torch.ones(())}, tx=tx)
    for i in range(steps):
        state = sim(state, torch.full((sim.num_ranks,), float(i + 1)))
    return sim, state


def test_averages_of_pieces_are_placed_like_the_parameters():
    tx = chain(sgd(0.1), ema(0.5))
    sim, state = trained({"data": 2}, tx)
    pieces = averaged_params(state)
    assert_bitwise(
        tree_map(torch.zeros_like, pieces), tree_map(torch.zeros_like, state.params), ""
    )
    whole = averaged_params(sim.unshard(state))
    got = sim.unshard(state.replace(params=pieces)).params
    assert_bitwise(got, whole, "averages")


def test_the_dtypes_are_those_of_the_parameters():
    params = {"w": torch.ones(2, dtype=torch.bfloat16)}
    state = zf.shard(params, zf.make_mesh({}), tx=ema(0.5))
    assert averaged_params(state)["w"].buffer.dtype == torch.bfloat16


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2, float("nan")])
def test_bad_values(decay):
    with pytest.raises(
        ValueError, match=r"ema: decay is .*\[0, 1\); .* example decay=0.999"
    ):
        ema(decay)


def test_bad_kinds():
    with pytest.raises(TypeError, match="ema: decay is a str"):
        ema("0.9")
    with pytest.raises(TypeError, match=r"params\['n'\] is torch.int64"):
        ema(0.9).init({"n": torch.arange(3)})
    with pytest.raises(TypeError, match=r"averaged_params takes a TrainState, got a d"):
        averaged_params({})


def test_a_state_without_or_with_several_averages():
    params, mesh = {"w": torch.ones(2)}, zf.make_mesh({})
    none = zf.shard(params, mesh, tx=adamw(0.1))
    two = zf.shard(params, mesh, tx=chain(ema(0.5), ema(0.9)))
    for state, count in ((none, 0), (zf.shard(params, mesh), 0), (two, 2)):
        with pytest.raises(StructureError, match=rf"has {count} EmaMoments .*ema\(0.9"):
            averaged_params(state)


def test_other_moments():
    p = {"w": torch.ones(2)}
    with pytest.raises(StructureError, match="ema: moments"):
        ema(0.9).update(p, (), p)
    with pytest.raises(StructureError, match="Pass the gradients of these params"):
        ema(0.9).update({"v": torch.ones(2)}, ema(0.9).init(p), p)
