# SPDX-License-Identifier: Apache-2.0
"""L4: transformations of different slots commute, bit for bit."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws.cases import assert_bitwise, cases, examples
from zfunc.testing import simulate

POLICIES = ("compute=f64,output=f64", "fp32", "bf16", "compute=bf16,output=bf16")


def check(case, policy):
    """All orders of partition, accumulate and precision are one step."""
    recipe = case.recipe
    transforms = (
        *recipe.transforms()[:1],
        zf.accumulate(recipe.num_microbatches),
        zf.precision(policy),
    )
    state, batch = case.shard(), case.split()[0]
    results = [
        simulate(zf.train_step(recipe.loss(), recipe.tx(), *order), case.mesh_shape)(
            state, batch
        )
        for order in itertools.permutations(transforms)
    ]
    for order, result in zip(itertools.permutations(range(3)), results, strict=True):
        assert_bitwise(result, results[0], f"order {order} against (0, 1, 2)")


@examples(0.5)
@given(
    cases(num_steps=1, remat=False, num_microbatches=st.integers(2, 3)),
    st.sampled_from(POLICIES),
)
def test_all_orders_of_three_transformations_are_one_step(case, policy):
    check(case, policy)


@examples(0.3)
@given(cases(num_steps=1, remat=False, dtype=torch.float32), st.sampled_from(POLICIES))
def test_in_float32(case, policy):
    check(case, policy)
