# SPDX-License-Identifier: Apache-2.0
"""Wrong hyper-parameters, masks, schedules and moments, and what is said about them."""

import numpy
import pytest
import torch

from zfunc.core.errors import StructureError
from zfunc.core.mesh import make_mesh
from zfunc.core.sharding import NamedSharding, P, place
from zfunc.optim import (
    adam,
    adamw,
    add_decayed_weights,
    apply_updates,
    chain,
    clip_by_global_norm,
    clip_by_value,
    constant,
    identity,
    scale_by_adam,
    scale_by_learning_rate,
    sgd,
    trace,
    warmup_cosine,
    warmup_linear,
)

NAN, INF = float("nan"), float("inf")

BAD_VALUES = [
    (lambda: sgd(-0.1), r"learning_rate is -0.1, expected a number in \[0, inf\)"),
    (lambda: sgd(NAN), "learning_rate is nan"),
    (lambda: sgd(0.1, momentum=-1), "momentum is -1, .* type .* momentum=0.9"),
    (lambda: sgd(0.1, nesterov=True), "nesterov with momentum=0.0 .* momentum=0.9"),
    (lambda: sgd(0.1, 0.9, True, dampening=0.1), "and dampening=0.1, .* no dampening"),
    (lambda: sgd(0.1, dampening=0.1), "no effect without momentum"),
    (lambda: sgd(0.1, weight_decay=-1e-2), "weight_decay is -0.01"),
    (lambda: trace(0.9, dampening=1.5), r"dampening is 1.5, .* \[0, 1\]"),
    (lambda: trace(0.9, dampening=-0.5), "dampening is -0.5"),
    (lambda: trace(0.0, nesterov=True), "nesterov with momentum=0.0"),
    (lambda: adam(-1e-3), "learning_rate is -0.001"),
    (lambda: adam(0.1, b1=1.0), r"b1 is 1.0, expected a number in \[0, 1\)"),
    (lambda: adam(0.1, b2=-0.1), r"b2 is -0.1, .* type for example b2=0.999"),
    (lambda: adam(0.1, eps=-1e-8), "eps is -1e-08"),
    (lambda: adam(0.1, eps=INF), "eps is inf"),
    (lambda: adamw(0.1, b2=NAN), "b2 is nan"),
    (lambda: adamw(0.1, weight_decay=-1), "weight_decay is -1"),
    (lambda: scale_by_adam(b1=1.5), "b1 is 1.5"),
    (lambda: clip_by_global_norm(0.0), r"max_norm is 0.0, .* \(0, inf\)"),
    (lambda: clip_by_global_norm(-1), r"type .* clip_by_global_norm\(1.0\)"),
    (lambda: clip_by_value(0), r"limit is 0, .* \(0, inf\)"),
    (lambda: constant(-1.0), "value is -1.0"),
    (lambda: warmup_linear(-1.0, 0, 10), "warmup_linear: peak is -1.0"),
    (lambda: warmup_linear(1.0, 0, 10, end=-1), "end is -1"),
    (lambda: warmup_linear(1.0, 11, 10), "warmup_steps is 11 and total_steps is 10"),
    (lambda: warmup_cosine(1.0, -1, 10), "warmup_cosine: warmup_steps is -1"),
    (lambda: warmup_cosine(1.0, 0, 0), "total_steps is 0, expected an int >= 1"),
]

BAD_KINDS = [
    (lambda: sgd("fast"), "learning_rate is a str, .* warmup_cosine"),
    (lambda: sgd(True), "learning_rate is a bool"),
    (lambda: sgd(torch.tensor(0.1)), "learning_rate is a Tensor"),
    (lambda: sgd(0.1, momentum=None), "momentum is a NoneType"),
    (lambda: sgd(0.1, 0.9, nesterov=1), "nesterov is a int, expected True or False"),
    (lambda: adam(0.1, b1=(0.9, 0.999)), "b1 is a tuple"),
    (lambda: adamw(0.1, mask={"w": True}), "mask is a dict, .* mask=decay_matrices"),
    (lambda: add_decayed_weights(0.0, mask=True), "mask is a bool"),
    (lambda: clip_by_global_norm("1"), "max_norm is a str"),
    (lambda: warmup_linear(1.0, 0.1, 10), "warmup_steps is a float, expected an int"),
    (lambda: warmup_linear(1.0, 0, True), "total_steps is a bool"),
    (lambda: constant(0.1)(0.5), r"given a float, .* schedule\(0\)"),
    (lambda: chain(sgd), "argument 0 is a function, .* call its maker"),
    (lambda: chain(identity(), [sgd(0.1)]), "argument 1 is a list"),
]


@pytest.mark.parametrize(("make", "match"), BAD_VALUES)
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(("make", "match"), BAD_KINDS)
def test_bad_kinds(make, match):
    with pytest.raises(TypeError, match=match):
        make()


def test_numbers_of_numpy_and_ints_are_numbers():
    adamw(numpy.float32(0.1), b1=0, weight_decay=numpy.float64(0.1))


@pytest.mark.parametrize("answer", [None, 1, torch.tensor(True)])
def test_a_mask_answers_true_or_false(answer):
    tx, params = adamw(0.1, mask=lambda path, leaf: answer), {"w": torch.ones(2)}
    with pytest.raises(
        TypeError, match=r"mask\('w', leaf\) returned a .* True or False"
    ):
        tx.init(params)


@pytest.mark.parametrize("answer", [None, "0.1", True, torch.ones(1)])
def test_a_schedule_returns_a_number(answer):
    tx, p = scale_by_learning_rate(lambda step: answer), torch.ones(1)
    with pytest.raises(TypeError, match="expected a 0-d tensor or a number"):
        tx.update(p, tx.init(p), p)


@pytest.mark.parametrize("tx", [sgd(0.1), trace(0.9), scale_by_adam()])
def test_parameters_are_floating_tensors(tx):
    with pytest.raises(TypeError, match=r"params\['n'\] is torch.int64"):
        tx.init({"n": torch.arange(3)})
    with pytest.raises(TypeError, match=r"params\['n'\] is a int"):
        tx.init({"n": 3})


# --- moments of another structure ----------------------------------------------------

PARAMS = {"w": torch.ones(2)}
PARTS = [
    identity(),
    add_decayed_weights(0.1),
    clip_by_value(1.0),
    clip_by_global_norm(1.0),
    trace(0.9),
    scale_by_adam(),
    scale_by_learning_rate(0.1),
    chain(),
    sgd(0.1),
    adamw(0.1),
]


@pytest.mark.parametrize("tx", PARTS)
@pytest.mark.parametrize("moments", [None, (1,), {"w": torch.ones(2)}, torch.ones(2)])
def test_moments_of_something_else(tx, moments):
    with pytest.raises(StructureError, match=r"moments = tx.init\(params\)"):
        tx.update(PARAMS, moments, PARAMS)


def test_moments_of_another_optimizer_are_named():
    moments = scale_by_adam().init(PARAMS)
    with pytest.raises(StructureError, match=r"trace: moments .*\n  missing: trace/w"):
        trace(0.9).update(PARAMS, moments, PARAMS)
    with pytest.raises(StructureError, match="a tuple of 3, expected the tuple of 2"):
        chain(trace(0.9), identity()).update(PARAMS, adam(0.1).init(PARAMS), PARAMS)


def test_moments_of_other_parameters_are_named():
    tx = adam(0.1)
    moments = tx.init({"v": torch.ones(2)})
    with pytest.raises(StructureError, match=r"missing: mu/w(.|\n)*not expected: mu/v"):
        tx.update(PARAMS, moments, PARAMS)


def test_moments_of_another_placement_are_named():
    tx, mesh = scale_by_adam(), make_mesh({"data": 1})
    split, whole = (
        {"w": place(torch.ones(2), NamedSharding(mesh, spec))}
        for spec in (P("data"), P())
    )
    with pytest.raises(StructureError, match=r"mu/w: expected .*P\('data'\)"):
        tx.update(split, tx.init(whole), split)


@pytest.mark.parametrize("tx", [add_decayed_weights(0.1), sgd(0.1, weight_decay=0.1)])
def test_updates_of_other_parameters_are_named(tx):
    with pytest.raises(StructureError, match="missing: w") as caught:
        tx.update({"v": torch.ones(2)}, tx.init(PARAMS), PARAMS)
    assert "Pass the gradients of these params" in str(caught.value)
    with pytest.raises(StructureError, match="missing: w"):
        apply_updates(PARAMS, {"v": torch.ones(2)})
