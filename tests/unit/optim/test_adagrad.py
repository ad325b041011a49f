# SPDX-License-Identifier: Apache-2.0
"""Adagrad against ``torch.optim.Adagrad``, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.optim import leafwise
from tests.unit.optim import test_transformations as owed
from zfunc.core.errors import StructureError
from zfunc.core.tree import tree_leaves
from zfunc.optim import (
    adagrad,
    apply_updates,
    scale_by_adagrad,
    scale_by_lion,
    warmup_linear,
)

TXS = {
    "adagrad": adagrad(0.1, lr_decay=0.1, weight_decay=0.1),
    "scheduled": adagrad(warmup_linear(0.1, 1, 5), lr_decay=0.1),
    "started": adagrad(0.1, initial_accumulator_value=0.3),
    "no eps": adagrad(0.1, eps=0.0),
    "scale_by_adagrad": scale_by_adagrad(0.1, 1e-3),
}


@settings(max_examples=40)
@given(
    lr=st.floats(0, 0.5),
    lr_decay=st.floats(0, 2),
    weight_decay=st.floats(0, 1),
    initial_accumulator_value=st.sampled_from([0.0, 1e-6, 0.1, 3.0]),
    eps=st.floats(1e-12, 1.0),
)
def test_adagrad_of_any_hyper_parameters(lr, **options):
    expected = leafwise.torch_trajectory(torch.optim.Adagrad, lr=lr, **options)
    leafwise.assert_same(leafwise.trajectory(adagrad(lr, **options))[0], expected)


def test_the_defaults_are_those_of_torch():
    expected = leafwise.torch_trajectory(torch.optim.Adagrad)
    leafwise.assert_same(leafwise.trajectory(adagrad(0.01))[0], expected)


def test_the_decay_multiplies_a_schedule():
    rates = [0.1 * 0.9**t / (1 + 0.5 * t) for t in range(leafwise.STEPS)]
    tx = adagrad(lambda step: 0.1 * 0.9 ** step.double(), lr_decay=0.5)
    same = adagrad(lambda step: torch.tensor(rates, dtype=torch.float64)[step])
    leafwise.assert_same(leafwise.trajectory(tx)[0], leafwise.trajectory(same)[0])


@pytest.mark.parametrize("start", [0.0, 0.1])
@pytest.mark.parametrize("eps", [0.0, 1e-10])
def test_zero_gradients_move_nothing(start, eps):
    tx = adagrad(0.1, initial_accumulator_value=start, eps=eps)
    leafwise.zero_gradients_move_nothing(tx)


def test_squares_that_vanish_move_nothing_without_eps():
    p = torch.zeros(3)
    tx = adagrad(0.1, eps=0.0)  # the square of 1e-30 is 0 in float32
    updates, _ = tx.update(torch.tensor([1e-30, 1.0, -1e-10]), tx.init(p), p)
    torch.testing.assert_close(updates, torch.tensor([0.0, -0.1, 0.1]))


def test_what_is_kept_starts_at_zero_whatever_it_starts_from():
    moments = adagrad(0.1, initial_accumulator_value=5.0).init(leafwise.start())
    assert not any(x.any() for x in tree_leaves(moments))


@pytest.mark.parametrize("tx", TXS.values(), ids=TXS)
@pytest.mark.parametrize("check", leafwise.OWED, ids=lambda f: f.__name__)
def test_what_every_transformation_owes(check, tx):
    check(tx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_get_the_update_of_wide_ones(dtype):
    owed.test_narrow_parameters_get_the_update_of_wide_ones(TXS["adagrad"], dtype)


def test_small_squares_are_not_lost_beside_a_large_start():
    p, tx = torch.zeros(1), adagrad(1.0, initial_accumulator_value=1e4)
    moments = tx.init(p)
    for _ in range(3):
        updates, moments = tx.update(torch.full((1,), 0.01), moments, p)
    assert moments[1].total.item() == pytest.approx(3e-4, rel=1e-6)
    assert apply_updates(p, updates).item() == pytest.approx(-1e-4, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: adagrad(-0.1), "learning_rate is -0.1"),
        (lambda: adagrad(0.1, lr_decay=-1), "adagrad: lr_decay is -1, .*lr_decay=0.0"),
        (lambda: adagrad(0.1, weight_decay=-1), "weight_decay is -1"),
        (lambda: adagrad(0.1, eps=-1e-8), "scale_by_adagrad: eps is -1e-08"),
        (
            lambda: adagrad(0.1, initial_accumulator_value=-1),
            "initial_accumulator_value is -1, .* type .*initial_accumulator_value=0.1",
        ),
    ],
)
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_kinds():
    with pytest.raises(TypeError, match="lr_decay is a str"):
        adagrad(0.1, lr_decay="0")
    with pytest.raises(TypeError, match="learning_rate is a str"):
        adagrad("0.1", lr_decay=0.5)
    p = torch.ones(2)
    for answer in (None, True, torch.ones(1)):
        tx = adagrad(lambda step, answer=answer: answer, lr_decay=0.5)
        with pytest.raises(TypeError, match="the learning-rate schedule returned"):
            tx.update(p, tx.init(p), p)


def test_other_moments():
    p = {"w": torch.ones(2)}
    with pytest.raises(StructureError, match="scale_by_adagrad: moments"):
        scale_by_adagrad().update(p, scale_by_lion().init(p), p)
