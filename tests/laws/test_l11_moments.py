# SPDX-License-Identifier: Apache-2.0
"""L11: ``tx.init(shard(p)) == shard(tx.init(p))``: moments of pieces are the pieces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws.cases import assert_bitwise, cases, examples
from tests.laws.test_l2_placement import check_buffers
from zfunc.core.sharding import is_sharded, place
from zfunc.optim import GradientTransformation
from zfunc.testing import spmd


def average():
    """Moments that are not zeros: a running mean of the parameters."""

    def update(updates, moments, params):
        return updates, zf.tree_map(lambda m, p: 0.9 * m + 0.1 * p, moments, params)

    return GradientTransformation(lambda p: zf.tree_map(lambda x: 2 * x, p), update)


def check(case, tx):
    """Both ways round, on every rank: equal in structure, dtypes, shapes and values."""

    def both(mesh, params):
        of_pieces = zf.shard(params, mesh, spec=case.recipe.spec, tx=tx).moments
        whole = tx.init(params)

        def piece(like, x):
            if not is_sharded(like):
                return x
            assert tuple(x.shape) == like.global_shape
            return place(x, like.sharding)

        pieces = zf.tree_map(piece, of_pieces, whole, is_leaf=is_sharded)
        return of_pieces, pieces

    ranks = zf.AbstractMesh(case.mesh_shape).size
    stacked = zf.tree_map(lambda x: x.expand(ranks, *x.shape), case.params)
    of_pieces, pieces = spmd(both, case.mesh_shape)(stacked)
    assert_bitwise(of_pieces, pieces, "moments")
    check_buffers(of_pieces)


@examples(1)
@given(cases(num_steps=1))
def test_moments_of_pieces_are_pieces_of_moments(case):
    check(case, case.recipe.tx())


@examples(0.3)
@given(cases(num_steps=1, dtype=torch.bfloat16))
def test_in_bfloat16(case):
    check(case, case.recipe.tx())


@examples(0.3)
@given(cases(num_steps=1))
def test_moments_with_values(case):
    check(case, zf.optim.chain(average(), case.recipe.tx()))


@examples(0.3)
@given(cases(num_steps=2, clip=None, remat=False), st.sampled_from([1, 2, 3]))
def test_moments_with_values_follow_the_square(case, zero):
    tx = zf.optim.chain(average(), case.recipe.tx())
    case = case.but(zero=zero, persistence_threshold=0)
    sharded = zf.train_step(case.recipe.loss(), tx, *case.recipe.transforms())
    plain = zf.train_step(case.recipe.loss(), tx)
    sim = zf.testing.simulate(sharded, case.mesh_shape)
    pieces, whole = sim.shard(case.params), zf.shard(case.params, zf.make_mesh({}))
    for batch, split in zip(case.batches, case.split(), strict=True):
        pieces, whole = sim(pieces, split), plain(whole, batch)
    got, want = sim.unshard(pieces).moments, zf.unshard(whole).moments
    assert not zf.testing.differences(got, want, rtol=1e-9, atol=1e-12)


def test_moments_of_another_optimizer_are_refused():
    state = zf.shard({"w": torch.ones(2)}, zf.make_mesh({}), tx=zf.optim.adam(0.1))
    step = zf.train_step(lambda p, b: p["w"].sum(), zf.optim.sgd(0.1, momentum=0.9))
    with pytest.raises(zf.StructureError, match=r"state\.moments"):
        step(state, ())
