# SPDX-License-Identifier: Apache-2.0
"""L2: a step keeps placement: the state has one treespec, before and after."""

import pytest
import torch
from hypothesis import given

import zfunc as zf
from tests.laws.cases import cases, examples
from zfunc.core.sharding import is_sharded
from zfunc.core.tree import leaves_with_path, tree_structure
from zfunc.testing import simulate, spmd, tree_loss

FIELDS = ("params", "grads", "moments")


def loss_without_aux(params, batch):
    return tree_loss(params, batch)[0]


def check(case):
    """With ``tx`` given to ``shard`` nothing about the state's structure changes."""
    before = case.shard()
    after = case.train(loss_without_aux, before)
    assert tree_structure(before) == tree_structure(after)
    for field in FIELDS:
        was, is_ = getattr(before, field), getattr(after, field)
        for (path, a), (_, b) in zip(
            leaves_with_path(was), leaves_with_path(is_), strict=True
        ):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{field}/{path}"
    check_buffers(after)


def check_buffers(state):
    """Buffers have the shape that their placement says, and their padding is zero."""
    for path, leaf in leaves_with_path(state, is_sharded):
        if not is_sharded(leaf):
            continue
        local = leaf.sharding.local_shape(leaf.global_shape)
        assert tuple(leaf.buffer.shape[1:]) == local, path
        for dim, axis in enumerate(leaf.sharding.spec):
            if axis is not None:
                check_padding(path, leaf, dim, axis)


def check_padding(path, leaf, dim, axis):
    mesh, rows = leaf.sharding.mesh, leaf.buffer.shape[dim + 1]

    def outside(mesh, buffer):
        position = zf.axis_index(axis, mesh) * rows + torch.arange(rows)
        padding = (position >= leaf.global_shape[dim]).to(buffer.dtype)
        return (buffer.movedim(dim, -1).abs() * padding).sum()

    assert not spmd(outside, mesh.shape)(leaf.buffer).any(), path


@examples(1)
@given(cases())
def test_a_step_keeps_placement(case):
    check(case)


@examples(0.5)
@given(cases(num_steps=2))
def test_moments_made_by_the_first_step_are_placed_like_those_of_shard(case):
    # The aux has no structure before the first step; after it, nothing changes.
    late = case.shard(tx=None)
    assert late.moments is None
    first, second = (case.train(state=late, batches=case.split()[:n]) for n in (1, 2))
    assert tree_structure(first) == tree_structure(second)
    early = case.shard()
    for field in FIELDS:
        assert tree_structure(getattr(first, field)) == tree_structure(
            getattr(early, field)
        )


def test_the_padding_check_sees_padding():
    # 3 rows on 2 ranks: the second rank has one row of padding.
    state = simulate(None, {"data": 2}).shard({"w": torch.ones(3)})
    check_buffers(state)
    with pytest.raises(AssertionError, match="w"):
        check_buffers(zf.tree_map(torch.ones_like, state.params))
