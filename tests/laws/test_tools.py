# SPDX-License-Identifier: Apache-2.0
"""The tools that laws are checked with: they see differences, and say which."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given

import zfunc as zf
from tests.laws.cases import cases, examples
from zfunc.core.tree import leaves_with_path
from zfunc.testing import (
    EquivalenceError,
    Recipe,
    assert_equivalent,
    differences,
    random_batch,
    random_tree,
    split_batch,
    tree_loss,
)
from zfunc.testing.recipe import OPTIMIZERS

PARAMS = random_tree({"w": torch.Size([5, 2]), "s": torch.Size([])}, seed=0)
BATCHES = [random_batch(6, seed) for seed in range(3)]


def biased_loss(params, batch):
    """Wrong on purpose: a mean that depends on how many samples a rank has."""
    loss, _ = tree_loss(params, batch)
    return loss * len(batch["y"])


def drifting_loss(params, batch):
    """Right for one step, at which the parameters are those of ``PARAMS``."""
    far = (params["s"].detach() - PARAMS["s"]).abs() > 1e-6
    loss, _ = tree_loss(params, batch)
    return loss * torch.where(far, len(batch["y"]), 6)


def test_a_failure_says_when_where_by_how_much_and_how():
    recipe = Recipe(zero=2, optimizer="adam")
    with pytest.raises(EquivalenceError) as caught:
        assert_equivalent(biased_loss, PARAMS, BATCHES, recipe, {"data": 3})
    error, text = caught.value, str(caught.value)
    assert isinstance(error, AssertionError)
    assert isinstance(error, zf.ZfuncError)
    assert (error.step, error.recipe) == (1, recipe)
    assert error.path.partition("/")[0] in ("grads", "metrics", "moments")
    assert error.path in text
    assert 0 < error.difference < math.inf
    assert repr(recipe) in text
    assert "step 1 of 3" in text
    assert "mesh {'data': 3}" in text


def test_every_step_is_compared():
    with pytest.raises(EquivalenceError) as caught:
        assert_equivalent(drifting_loss, PARAMS, BATCHES, Recipe(), {"data": 2})
    assert caught.value.step == 2


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"batch\['kind'\] has 6 samples.* 4 ranks"):
        assert_equivalent(None, PARAMS, BATCHES, Recipe(), {"data": 4})


def test_ranks_along_other_axes_get_the_same_slice():
    stacked = split_batch(torch.arange(4), {"tensor": 2, "data": 2})
    assert stacked.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    stacked = split_batch(torch.arange(4), {"data": 2, "tensor": 2})
    assert stacked.tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert split_batch(torch.tensor(7), {"data": 3}).tolist() == [7, 7, 7]


NAN = math.nan


@pytest.mark.parametrize(
    ("got", "want", "excess"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, NAN], [1.0, NAN], None),
        ([math.inf], [math.inf], None),
        ([], [], None),
        ([1.0, 2.0 + 1e-6], [1.0, 2.0], None),
        ([1.0, 2.2], [1.0, 2.0], 1e4),
        ([1.0, NAN], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [1.0, NAN], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([1.0], [1.0, 2.0], math.inf),
    ],
)
def test_differences_in_values(got, want, excess):
    got, want = (torch.tensor(x, dtype=torch.float64) for x in (got, want))
    found = differences({"w": got}, {"w": want}, rtol=1e-5)
    if excess is None:
        assert found == []
    else:
        assert [d.path for d in found] == ["w"]
        assert found[0].excess == pytest.approx(excess)


def test_differences_in_whole_numbers_are_exact():
    big = torch.tensor(2**60)
    assert differences(big, big.clone()) == []
    assert len(differences(big + 1, big)) == 1


def test_differences_in_structure():
    one = torch.ones(1)
    found = differences({"a": one, "b": one}, {"a": one, "c": one})
    assert sorted(d.path for d in found) == ["b", "c"]


def test_the_worst_leaf_comes_first():
    want = {"a": torch.ones(1), "b": torch.ones(1)}
    got = {"a": torch.full((1,), 1.1), "b": torch.full((1,), 1.2)}
    assert [d.path for d in differences(got, want, rtol=1e-3)] == ["b", "a"]


@examples(1)
@given(cases(num_steps=1))
def test_every_element_of_the_tree_loss_matters(case):
    """Its gradient has no zeros, so no mistake can hide in an element."""

    def scalar(params):
        return tree_loss(params, case.batches[0])[0]

    _, grads = zf.value_and_grad(scalar)(case.params)
    for path, grad in leaves_with_path(grads):
        assert grad.isfinite().all(), path
        assert (grad.abs() > 1e-9).double().mean() > 0.9 or grad.numel() < 2, path


@examples(1)
@given(cases())
def test_a_recipe_prints_as_what_makes_it(case):
    assert eval(repr(case.recipe)) == case.recipe
    assert {f.name for f in dataclasses.fields(Recipe)} >= {"zero", "optimizer", "clip"}


def test_a_recipe_refuses_unknown_optimizers():
    with pytest.raises(ValueError, match="'sgd', 'momentum'"):
        Recipe(optimizer="shampoo")
    assert {Recipe(optimizer=name).optimizer for name in OPTIMIZERS} == set(OPTIMIZERS)
