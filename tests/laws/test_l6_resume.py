# SPDX-License-Identifier: Apache-2.0
"""L6: training is a fold: ``fold(xs + ys) == fold(ys, fold(xs))``, bit for bit.

The state in the middle is all there is: it is copied, leaf by leaf as a checkpoint
does, and a step that was made afresh goes on from the copy.
"""

from hypothesis import given
from hypothesis import strategies as st

from tests.laws.cases import assert_bitwise, cases, copied, examples, keyed_loss
from zfunc.core.tree import tree_flatten, tree_unflatten


def check(case, cut, loss_fn):
    batches = case.split()
    whole = case.train(loss_fn, case.shard(key=3), batches)
    middle = case.train(loss_fn, case.shard(key=3), batches[:cut])
    leaves, spec = tree_flatten(middle)
    restored = tree_unflatten(spec, [leaf.clone() for leaf in leaves])
    resumed = case.train(loss_fn, restored, batches[cut:])
    assert_bitwise(resumed, whole, f"resumed after {cut} of {len(batches)} steps")
    # The same state and batches again: nothing was remembered elsewhere.
    again = case.train(loss_fn, middle, batches[cut:])
    assert_bitwise(again, whole, f"resumed again after {cut} steps")


@examples(0.5)
@given(cases(num_steps=3), st.integers(0, 3), st.sampled_from([None, keyed_loss]))
def test_resuming_is_not_stopping(case, cut, loss_fn):
    check(case, cut, loss_fn)


@examples(0.2)
@given(cases(num_steps=2))
def test_one_state_may_be_trained_twice(case):
    start = case.shard()
    kept = copied(start)
    first = case.train(state=start)
    assert_bitwise(case.train(state=start), first, "the second training")
    assert_bitwise(start, kept, "the initial state")
