# SPDX-License-Identifier: Apache-2.0
"""Randomness is an argument: a sample's key depends on the seed, the step and itself.

Not on the mesh, nor on the microbatches: a loss with dropout obeys L1 as it is.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws.cases import cases, examples, keyed_loss
from zfunc.testing import assert_equivalent


def check(case, key):
    assert_equivalent(
        keyed_loss, case.params, case.batches, case.recipe, case.mesh_shape, key=key
    )


@examples(1)
@given(cases(weighted=False), st.integers(0, 2**40))
def test_dropout_does_not_depend_on_mesh_or_microbatches(case, key):
    check(case, key)


def seen(num_samples, num_steps, key):
    """The numbers that the samples' keys give at each step, as ``aux``."""

    def loss_fn(params, batch, key):
        u = zf.random.uniform(key, ())
        one_hot = torch.nn.functional.one_hot(batch, num_samples).to(u.dtype)
        sums = (u.unsqueeze(1) * one_hot).sum(0)
        aux = {str(i): zf.Mean(s, torch.ones(())) for i, s in enumerate(sums)}
        return params["w"].sum(), aux

    step = zf.train_step(loss_fn, zf.optim.sgd(0.1))
    state = zf.shard({"w": torch.ones(2)}, zf.make_mesh({}), key=key)
    rows = []
    for _ in range(num_steps):
        state = step(state, torch.arange(num_samples))
        rows.append(
            torch.stack([state.metrics.aux[str(i)] for i in range(num_samples)])
        )
    return torch.stack(rows)


def check_fresh(key):
    numbers = torch.cat([seen(16, 4, key=key), seen(16, 4, key=key + 1)])
    assert len(numbers.unique()) == numbers.numel()


def test_every_sample_of_every_step_has_a_key_of_its_own():
    check_fresh(0)


def test_the_keys_are_a_function_of_the_seed():
    assert torch.equal(seen(8, 2, key=5), seen(8, 2, key=5))


@pytest.mark.parametrize("data", [0, 1, 7, -1, 2**31, 2**63 - 1])
def test_a_key_folds_a_number_like_a_tensor(data):
    key = torch.tensor(3)
    folded = zf.random.fold_in(key, torch.tensor(data))
    assert torch.equal(zf.random.fold_in(key, data), folded)
