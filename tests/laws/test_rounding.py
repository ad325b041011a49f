# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding is a function of key, count, leaf and element: not of the mesh.

Nor of how many leaves a step updates at a time.
"""

from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws.cases import assert_bitwise, examples
from zfunc.core.sharding import NamedSharding, place, replicate
from zfunc.core.tree import tree_map
from zfunc.core.update import consuming_update, pure_update
from zfunc.testing import spmd
from zfunc.testing.strategies import meshes, param_trees

KEYS = st.integers(0, 2**20)


class Layout(NamedTuple):
    """Parameters, and for each leaf where it lives."""

    params: Any
    specs: Any

    def __repr__(self):
        shapes = tree_map(lambda x: tuple(x.shape), self.params)
        return f"params {shapes} placed {self.specs}"


@st.composite
def layouts(draw):
    """Trees of which any dim of each leaf is sharded, or none."""
    params = draw(param_trees(dtype=torch.bfloat16))

    def dim_of(leaf):
        dim = draw(st.integers(-1, leaf.dim() - 1))
        return zf.P() if dim < 0 else zf.P(*[None] * dim, "data")

    return Layout(params, tree_map(dim_of, params))


def optimizer(key):
    return zf.optim.stochastic_rounding(zf.optim.sgd(0.01, momentum=0.9), key=key)


def steps(tx, params, grads, update=pure_update, count=2):
    moments = tx.init(params)
    for _ in range(count):
        params, moments = update(tx, grads, moments, params)
    return params, moments


def consuming(tx, grads, moments, params):
    return consuming_update(tx, grads, [params, moments])


def check(layout, mesh_shape, key):
    """The same bits on every rank of every mesh."""
    params, specs = layout
    tx, grads = optimizer(key), tree_map(lambda p: 3 * p.float() + 1, params)

    def program(mesh, *trees):
        placed = [
            tree_map(lambda x, s: place(x, NamedSharding(mesh, s)), tree, specs)
            for tree in trees
        ]
        return replicate(steps(tx, *placed))

    ranks = zf.AbstractMesh(mesh_shape).size
    stacked = tree_map(lambda x: x.expand(ranks, *x.shape), (params, grads))
    want = tree_map(lambda x: x.expand(ranks, *x.shape), steps(tx, params, grads))
    assert_bitwise(spmd(program, mesh_shape)(*stacked), want, "rounded")


def check_groups(layout, key):
    """The same bits where a step updates a few leaves at a time."""
    params = layout.params
    tx, grads = optimizer(key), tree_map(lambda p: 3 * p.float() + 1, params)
    got = steps(tx, params, grads, consuming)
    assert_bitwise(got, steps(tx, params, grads), "in groups")


@examples(0.4)
@given(layouts(), meshes(), KEYS)
def test_the_bits_do_not_depend_on_the_mesh(layout, mesh_shape, key):
    check(layout, mesh_shape, key)


@examples(0.4)
@given(layouts(), KEYS)
def test_the_bits_do_not_depend_on_groups_of_leaves(layout, key):
    check_groups(layout, key)
