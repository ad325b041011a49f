# SPDX-License-Identifier: Apache-2.0
"""Lion against algorithm 2 of its paper, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.optim import leafwise
from tests.unit.optim import test_transformations as owed
from zfunc.core.errors import StructureError
from zfunc.optim import (
    apply_updates,
    decay_matrices,
    lion,
    scale_by_adam,
    scale_by_lion,
    warmup_cosine,
)

TXS = {
    "lion": lion(0.1, weight_decay=0.1),
    "scheduled": lion(warmup_cosine(0.1, 1, 5), mask=decay_matrices, weight_decay=0.1),
    "scale_by_lion": scale_by_lion(0.5, 0.9),
}


def papers(lr, b1, b2, weight_decay, decays=lambda p: True):
    """Chen et al., algorithm 2, line by line; ``lr`` is a function of the step."""
    params = leafwise.start()
    m = {k: torch.zeros_like(p) for k, p in params.items()}
    path = []
    for step in range(leafwise.STEPS):
        new = {}
        for k, theta in params.items():
            g = leafwise.gradient(theta, step)
            c = b1 * m[k] + (1 - b1) * g
            decay = weight_decay if decays(theta) else 0.0
            new[k] = theta - lr(step) * (torch.sign(c) + decay * theta)
            m[k] = b2 * m[k] + (1 - b2) * g
        params = new
        path.append(params)
    return path, m


@settings(max_examples=40)
@given(
    lr=st.floats(0, 0.2),
    b1=st.floats(0, 0.999),
    b2=st.floats(0, 0.9999),
    weight_decay=st.floats(0, 1),
)
def test_lion_of_any_hyper_parameters(lr, b1, b2, weight_decay):
    path, moments = leafwise.trajectory(lion(lr, b1, b2, weight_decay))
    expected, m = papers(lambda step: lr, b1, b2, weight_decay)
    leafwise.assert_same(path, expected)
    leafwise.assert_same([moments[0].mu], [m])


def test_a_schedule_and_a_mask():
    schedule = warmup_cosine(0.2, 2, 6, end=0.01)
    tx = lion(schedule, weight_decay=0.3, mask=decay_matrices)
    expected, _ = papers(
        lambda t: float(schedule(t)), 0.9, 0.999, 0.3, lambda p: p.dim() == 2
    )
    leafwise.assert_same(leafwise.trajectory(tx)[0], expected)


def test_the_defaults_are_those_of_deepspeed():
    expected, _ = papers(lambda step: 1e-3, 0.9, 0.999, 0.0)
    leafwise.assert_same(leafwise.trajectory(lion(1e-3))[0], expected)


def test_a_common_factor_changes_nothing():
    p = {"w": torch.zeros(50, dtype=torch.float64)}
    tx, paths = scale_by_lion(), []
    for factor in (1.0, 2.0**20):  # a power of two: the same bits
        moments, path = tx.init(p), []
        for step in range(5):
            u, moments = tx.update(
                {"w": factor * leafwise.randn(50, seed=step)}, moments, p
            )
            path.append(u)
        paths.append(path)
    assert all(torch.equal(a["w"], b["w"]) for a, b in zip(*paths, strict=True))


@pytest.mark.parametrize("tx", TXS.values(), ids=TXS)
@pytest.mark.parametrize("check", leafwise.OWED, ids=lambda f: f.__name__)
def test_what_every_transformation_owes(check, tx):
    check(tx)


def test_zero_gradients_move_nothing():
    leafwise.zero_gradients_move_nothing(lion(0.1))
    leafwise.zero_gradients_move_nothing(lion(0.1, b1=0.0, b2=0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_get_the_update_of_wide_ones(dtype):
    owed.test_narrow_parameters_get_the_update_of_wide_ones(TXS["lion"], dtype)


def test_every_element_moves_by_the_rate():
    p = torch.ones(3, dtype=torch.bfloat16)
    tx = lion(0.25)
    updates, _ = tx.update(torch.tensor([1e-20, -1e20, 0.0]), tx.init(p), p)
    assert apply_updates(p, updates).tolist() == [0.75, 1.25, 1.0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: lion(-0.1), "learning_rate is -0.1"),
        (lambda: lion(0.1, b1=1.0), r"scale_by_lion: b1 is 1.0, .* \[0, 1\); .*b1=0.9"),
        (lambda: lion(0.1, b2=-0.5), "b2 is -0.5, .* type for example b2=0.999"),
        (lambda: lion(0.1, weight_decay=-1), "weight_decay is -1"),
    ],
)
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_kinds():
    with pytest.raises(TypeError, match="b1 is a str"):
        scale_by_lion(b1="0.9")
    with pytest.raises(TypeError, match="mask is a dict"):
        lion(0.1, mask={})
    with pytest.raises(TypeError, match=r"params\['n'\] is torch.int64"):
        lion(0.1).init({"n": torch.arange(3)})


def test_other_moments():
    p = {"w": torch.ones(2)}
    with pytest.raises(StructureError, match="scale_by_lion: moments"):
        scale_by_lion().update(p, scale_by_adam().init(p), p)
