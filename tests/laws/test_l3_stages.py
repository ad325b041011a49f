# SPDX-License-Identifier: Apache-2.0
"""L3: the ZeRO stages agree bit for bit, and may change from step to step.

At one microbatch stages 1, 2 and 3 add up the same numbers in the same order; at more,
stage 1 adds microbatches first and ranks second, the others ranks first. Stage 0 adds
like stage 1; only its norm is a sum over whole leaves instead of pieces.

(A leaf that several blocks of ``remat`` use is gathered and reduced once per block at
stage 3, so there the stages agree to rounding only: L1 is about that.)
"""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from tests.laws.cases import assert_bitwise, cases, examples
from zfunc.core.tree import tree_structure


def check_one_microbatch(case):
    one, two, three = (
        case.unshard(case.but(zero=z, persistence_threshold=t).train())
        for z, t in ((1, 0), (2, 0), (3, case.recipe.persistence_threshold))
    )
    assert_bitwise(two, one, "stage 2 against stage 1")
    assert_bitwise(three, one, "stage 3 against stage 1")


def check_any_microbatches(case):
    two, three = (case.unshard(case.but(zero=z).train()) for z in (2, 3))
    assert_bitwise(three, two, "stage 3 against stage 2")


def check_stage_0(case):
    zero, one = (case.unshard(case.but(zero=z).train()) for z in (0, 1))
    norm = one.metrics.grad_norm
    zero = zero.replace(metrics=dataclasses.replace(zero.metrics, grad_norm=norm))
    assert_bitwise(zero, one, "stage 0 against stage 1")


def check_switching(case, stages):
    """Any sequence of stages gives the state that one stage gives, also in between."""
    switched = constant = case.shard()
    for batch, stage in zip(case.split(), stages, strict=True):
        switched = case.but(zero=stage).train(state=switched, batches=[batch])
        constant = case.train(state=constant, batches=[batch])
        assert tree_structure(switched) == tree_structure(constant)
        assert_bitwise(switched, constant, f"stage {stage}")


@examples(1)
@given(cases(zero=3, num_microbatches=1))
def test_stages_1_2_3_agree_at_one_microbatch(case):
    check_one_microbatch(case)


@examples(1)
@given(cases(zero=2))
def test_stages_2_and_3_agree_at_any_number_of_microbatches(case):
    check_any_microbatches(case)


@examples(1)
@given(cases(zero=1, clip=None))
def test_stages_0_and_1_agree_without_clipping(case):
    check_stage_0(case)


@examples(0.5)
@given(
    cases(zero=1, num_microbatches=1, num_steps=3),
    st.lists(st.sampled_from([1, 2, 3]), min_size=3, max_size=3),
)
def test_the_stage_may_change_at_any_step(case, stages):
    check_switching(case, stages)
