# SPDX-License-Identifier: Apache-2.0
"""RMSprop against ``torch.optim.RMSprop``, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.optim import leafwise
from tests.unit.optim import test_transformations as owed
from zfunc.core.errors import StructureError
from zfunc.core.tree import tree_leaves
from zfunc.optim import rmsprop, scale_by_rms, warmup_linear

TXS = {
    "rmsprop": rmsprop(warmup_linear(0.1, 1, 5), weight_decay=0.1),
    "momentum": rmsprop(0.1, momentum=0.9),
    "centered": rmsprop(0.1, alpha=0.9, momentum=0.9, centered=True),
    "no eps": rmsprop(0.1, eps=0.0),
    "centered, no eps": rmsprop(0.1, eps=0.0, centered=True),
    "scale_by_rms": scale_by_rms(0.9, 1e-3),
}


@settings(max_examples=40)
@given(
    lr=st.floats(0, 0.1),
    alpha=st.floats(0, 0.9999),
    eps=st.floats(1e-10, 1.0),
    weight_decay=st.floats(0, 1),
    momentum=st.one_of(st.just(0.0), st.floats(0.01, 0.99)),
)
def test_rmsprop_of_any_hyper_parameters(lr, **options):
    expected = leafwise.torch_trajectory(torch.optim.RMSprop, lr=lr, **options)
    leafwise.assert_same(leafwise.trajectory(rmsprop(lr, **options))[0], expected)


# The variance is the difference of two means: with alpha near 0 they are nearly equal
# and neither library has many digits of it.
@settings(max_examples=40)
@given(
    lr=st.floats(0, 0.1),
    alpha=st.floats(0.3, 0.999),
    eps=st.floats(1e-6, 1.0),
    weight_decay=st.floats(0, 1),
    momentum=st.one_of(st.just(0.0), st.floats(0.01, 0.9)),
)
def test_centered_of_any_hyper_parameters(lr, **options):
    options["centered"] = True
    expected = leafwise.torch_trajectory(torch.optim.RMSprop, lr=lr, **options)
    leafwise.assert_same(leafwise.trajectory(rmsprop(lr, **options))[0], expected)


def test_the_defaults_are_those_of_torch():
    expected = leafwise.torch_trajectory(torch.optim.RMSprop)
    leafwise.assert_same(leafwise.trajectory(rmsprop(0.01))[0], expected)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("alpha", [0.0, 0.99])
def test_zero_gradients_move_nothing(alpha, eps, centered):
    tx = rmsprop(0.1, alpha, eps, centered=centered, momentum=0.9)
    leafwise.zero_gradients_move_nothing(tx)


def test_constant_gradients_have_a_variance_that_is_not_negative():
    # torch's is -1e-17 here after some steps, and its parameters are NaN from then on.
    p, g = torch.zeros(64), torch.rand(64, generator=torch.Generator().manual_seed(0))
    tx = rmsprop(1e-3, alpha=0.5, centered=True)
    theirs = p.clone().requires_grad_()
    optimizer = torch.optim.RMSprop([theirs], 1e-3, alpha=0.5, centered=True)
    moments = tx.init(p)
    for _ in range(60):
        updates, moments = tx.update(g, moments, p)
        p = p + updates
        theirs.grad = g.clone()
        optimizer.step()
    assert p.isfinite().all()
    assert not theirs.isfinite().all()


def test_centered_keeps_a_second_buffer_and_momentum_a_third():
    def floats(tx):
        return sum(x.dim() for x in tree_leaves(tx.init(torch.zeros(3))))

    assert floats(rmsprop(0.1)) == 1
    assert floats(rmsprop(0.1, centered=True)) == 2
    assert floats(rmsprop(0.1, momentum=0.9, centered=True)) == 3


@pytest.mark.parametrize("tx", TXS.values(), ids=TXS)
@pytest.mark.parametrize("check", leafwise.OWED, ids=lambda f: f.__name__)
def test_what_every_transformation_owes(check, tx):
    check(tx)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_get_the_update_of_wide_ones(dtype):
    owed.test_narrow_parameters_get_the_update_of_wide_ones(TXS["centered"], dtype)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: rmsprop(-0.1), "learning_rate is -0.1"),
        (lambda: rmsprop(0.1, alpha=1.0), r"scale_by_rms: alpha is 1.0, .*alpha=0.99"),
        (lambda: rmsprop(0.1, eps=-1e-8), "scale_by_rms: eps is -1e-08"),
        (lambda: rmsprop(0.1, momentum=-1), "rmsprop: momentum is -1, .*momentum=0.9"),
        (lambda: rmsprop(0.1, weight_decay=-1), "weight_decay is -1"),
    ],
)
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_kinds():
    with pytest.raises(TypeError, match="centered is a int, expected True or False"):
        rmsprop(0.1, centered=1)
    with pytest.raises(TypeError, match="momentum is a NoneType"):
        rmsprop(0.1, momentum=None)


def test_other_moments():
    p = {"w": torch.ones(2)}
    plain, centered = scale_by_rms(), scale_by_rms(centered=True)
    with pytest.raises(StructureError, match="missing: mu/w"):
        centered.update(p, plain.init(p), p)
    with pytest.raises(StructureError, match="not expected: mu/w"):
        plain.update(p, centered.init(p), p)
