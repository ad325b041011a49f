# SPDX-License-Identifier: Apache-2.0
"""What the laws are about: parameters, batches, recipe and mesh, drawn together."""

import dataclasses
import functools
from typing import Any, NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st

import zfunc as zf
from zfunc.core.tree import leaves_with_path, tree_structure
from zfunc.testing import Recipe, differences, simulate, split_batch, tree_loss
from zfunc.testing.strategies import batches, meshes, param_trees, recipes


class Case(NamedTuple):
    """One example of a law; the numbers in its tensors come from drawn seeds."""

    recipe: Recipe
    mesh_shape: dict[str, int]
    params: Any
    batches: list[Any]

    def but(self, **changes):
        """The case with other fields in its recipe."""
        return self._replace(recipe=dataclasses.replace(self.recipe, **changes))

    def split(self):
        """The batches as the ranks are given them, stacked by rank."""
        return [split_batch(b, self.mesh_shape) for b in self.batches]

    def shard(self, **options):
        """The initial state on a simulated mesh, moments included."""
        options = {"tx": self.recipe.tx(), "spec": self.recipe.spec, **options}
        return simulate(None, self.mesh_shape).shard(self.params, **options)

    def train(self, loss_fn=None, state=None, batches=None):
        """The state on the simulated mesh after the batches."""
        sim = simulate(self.recipe.step(loss_fn), self.mesh_shape)
        start = self.shard() if state is None else state
        return functools.reduce(
            sim, self.split() if batches is None else batches, start
        )

    def unshard(self, state):
        """The full state, as rank 0 sees it."""
        return simulate(None, self.mesh_shape).unshard(state)


@st.composite
def cases(draw, /, *, num_steps=2, dtype=torch.float64, mesh_shapes=None, **fixed):
    """Cases whose recipe has some fields fixed."""
    recipe = draw(recipes(**fixed))
    mesh_shape = draw(meshes() if mesh_shapes is None else mesh_shapes)
    params = draw(param_trees(dtype=dtype))
    drawn = draw(batches(recipe, mesh_shape, num_steps=num_steps, dtype=dtype))
    return Case(recipe, mesh_shape, params, drawn)


def examples(times):
    """Settings for ``times`` as many examples as the profile has."""
    return settings(max_examples=round(times * settings.default.max_examples))


def assert_bitwise(got, want, what):
    """The two trees are equal to the last bit, in placement, dtypes and values."""
    assert tree_structure(got) == tree_structure(want), what
    pairs = zip(leaves_with_path(got), leaves_with_path(want), strict=True)
    for (path, a), (_, b) in pairs:
        assert a.dtype == b.dtype, f"{what}: {path} is {a.dtype}, not {b.dtype}"
    wrong = differences(got, want)
    assert not wrong, f"{what}: {wrong[0]} of {len(wrong)} leaves"


def copied(tree):
    """The tree with memory of its own."""
    return zf.tree_map(torch.clone, tree)


def keyed_loss(params, batch, key):
    """``tree_loss`` on features that dropout has thinned, with noisy targets."""
    x = zf.random.dropout(key, batch["x"], 0.4)
    noise = zf.random.uniform(key, ()).to(x.dtype)
    return tree_loss(params, {**batch, "x": x, "y": batch["y"] + noise})
