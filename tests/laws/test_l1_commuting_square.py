# SPDX-License-Identifier: Apache-2.0
"""L1: ``unshard(step(shard(s), b)) == step(s, b)``."""

import functools

import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws.cases import assert_bitwise, cases, examples
from zfunc.testing import assert_equivalent, differences, tree_loss


def check(case):
    assert_equivalent(None, case.params, case.batches, case.recipe, case.mesh_shape)


@examples(6)
@given(cases())
def test_sharded_training_is_unsharded_training(case):
    check(case)


@examples(1)
@given(cases(zero=st.integers(1, 3)), st.data())
def test_whatever_dim_of_each_leaf_is_sharded(case, data):
    def layout(leaf):
        dim = data.draw(st.integers(-1, leaf.dim() - 1))
        return zf.P() if dim < 0 else zf.P(*[None] * dim, "data")

    spec = zf.tree_map(layout, case.params)
    args = (case.params, case.batches, case.recipe, case.mesh_shape)
    assert_equivalent(None, *args, spec=spec)


@examples(0.2)
@given(cases(num_steps=6))
def test_over_many_steps(case):
    check(case)


@examples(1)
@given(cases(num_steps=1), st.booleans())
def test_with_a_block_of_remat_per_use_of_a_leaf(case, weighted):
    plain = functools.partial(tree_loss, weighted=weighted)
    blocks = functools.partial(plain, remat=True)
    check_blocks(case, plain, blocks)
    assert_equivalent(blocks, case.params, case.batches, case.recipe, case.mesh_shape)


def check_blocks(case, plain, blocks):
    """The unsharded gradient is not changed by remat; L1 alone cannot see that."""
    state, batch = zf.shard(case.params, zf.make_mesh({})), case.batches[0]
    want = case.recipe.reference(plain)(state, batch)
    got = case.recipe.reference(blocks)(state, batch)
    # Sums over the uses of a leaf may be taken in another order.
    wrong = differences(
        zf.unshard(got).grads, zf.unshard(want).grads, rtol=1e-12, atol=1e-14
    )
    assert not wrong, wrong


def exact_loss(params, batch):
    """Linear with whole coefficients: sums of its gradients have no rounding."""
    leaves = zf.tree_leaves(params)
    n = (4 * batch["x"].sum(1)).round() * batch["weight"]
    total = sum((n.sum() * (i + 1) * leaf.sum() for i, leaf in enumerate(leaves)), 0.0)
    return zf.Mean(total, batch["weight"].sum())


def check_exact(case):
    """Where arithmetic is exact the square commutes to the last bit."""
    state = zf.shard(case.params, zf.make_mesh({}), tx=case.recipe.tx())
    want = zf.unshard(case.recipe.reference(exact_loss)(state, case.batches[0]))
    got = case.unshard(case.train(exact_loss))
    for field in ("grads", "params", "moments"):
        assert_bitwise(getattr(got, field), getattr(want, field), field)


@examples(1)
@given(cases(num_steps=1, clip=None))
def test_bitwise_where_sums_are_exact(case):
    check_exact(case)


@examples(0.5)
@given(cases(dtype=torch.float32, clip=None, optimizer=st.just("sgd")))
def test_bitwise_in_float32_too(case):
    check_exact(case._replace(batches=case.batches[:1]))
