# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies: meshes, parameters, recipes and batches to check laws on.

Shapes and options are drawn, so they shrink; numbers come from a drawn seed. Needs
hypothesis (``pip install zfunc-torch[testing]``), which nothing else in zfunc does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st

from zfunc.core.tree import PyTree
from zfunc.testing.recipe import OPTIMIZERS, Recipe
from zfunc.testing.trees import random_batch, random_tree

MESHES_OF_TWO_AXES = ((2, 2), (2, 3), (3, 2), (4, 1))


def meshes(
    *, max_ranks: int = 5, other_axes: bool = True
) -> st.SearchStrategy[dict[str, int]]:
    """Mesh shapes: ``{"data": n}``, sometimes with an axis "tensor" before or after.

    Args:
      max_ranks: the largest data axis of a mesh of one axis.
      other_axes: also draw meshes of two axes, of up to 6 ranks.

    Example:
      >>> from hypothesis import find, settings
      >>> quiet = settings(database=None)
      >>> find(meshes(), lambda shape: len(shape) == 2, settings=quiet)
      {'data': 2, 'tensor': 2}
    """
    one_axis = st.integers(1, max_ranks).map(lambda n: {"data": n})
    if not other_axes:
        return one_axis
    two_axes = st.builds(
        lambda sizes, names: dict(zip(names, sizes, strict=True)),
        st.sampled_from(MESHES_OF_TWO_AXES),
        st.sampled_from((("data", "tensor"), ("tensor", "data"))),
    )
    return st.one_of(one_axis, one_axis, one_axis, two_axes)


def shapes(*, max_dims: int = 3) -> st.SearchStrategy[torch.Size]:
    """Shapes of leaves: scalars, few and many rows, and no rows at all.

    Example:
      >>> from hypothesis import find, settings
      >>> find(shapes(), lambda s: 0 in s, settings=settings(database=None))
      torch.Size([0])
    """
    rows = st.one_of(st.integers(1, 5), st.sampled_from([0, 7, 12, 33]))

    def of_dims(dims: int) -> st.SearchStrategy[torch.Size]:
        sizes = [rows, *[st.integers(1, 4)] * max_dims][:dims]
        return st.tuples(*sizes).map(torch.Size)

    return st.integers(0, max_dims).flatmap(of_dims)


@st.composite
def param_trees(
    draw: st.DrawFn,
    /,
    dtype: torch.dtype = torch.float64,
    *,
    max_leaves: int = 5,
) -> PyTree:
    """Parameters: nested dicts, lists and tuples of tensors, or a tensor alone.

    Example:
      >>> from hypothesis import find, settings
      >>> quiet = settings(database=None)
      >>> from zfunc.core.tree import tree_leaves
      >>> tree = find(param_trees(), lambda t: isinstance(t, dict), settings=quiet)
      >>> all(x.dtype == torch.float64 for x in tree_leaves(tree))
      True
    """
    num_leaves = draw(st.integers(1, max_leaves))
    leaves = [draw(shapes()) for _ in range(num_leaves)]
    return random_tree(draw(_nested(leaves)), draw(_seeds()), dtype=dtype)


@st.composite
def _nested(draw: st.DrawFn, /, leaves: list[PyTree]) -> PyTree:
    """Some container of the leaves: flat, or with the last ones deeper."""
    kind = draw(st.sampled_from(["list", "tuple", "dict", "dict"]))
    if len(leaves) == 1 and draw(st.booleans()):
        return leaves[0]
    flat = draw(st.integers(1, len(leaves)))
    nodes = leaves[:flat]
    if leaves[flat:]:
        nodes.append(draw(_nested(leaves[flat:])))
    if kind == "dict":
        # Not in the order of the keys, which is that of the leaves.
        return {f"w{i}": nodes[i] for i in reversed(range(len(nodes)))}
    return tuple(nodes) if kind == "tuple" else nodes


@st.composite
def recipes(draw: st.DrawFn, /, **fixed: Any) -> Recipe:
    """Recipes: all stages and optimizers, 1 to 3 microbatches, options on and off.

    Args:
      draw: given by hypothesis.
      **fixed: fields of ``Recipe`` to keep, as values or as strategies.

    Example:
      >>> from hypothesis import find, settings
      >>> quiet = settings(database=None)
      >>> find(recipes(zero=2), lambda r: r.num_microbatches > 1, settings=quiet).zero
      2
    """
    options: dict[str, Any] = {
        "zero": st.sampled_from([0, 1, 2, 3]),
        "num_microbatches": st.integers(1, 3),
        "optimizer": st.sampled_from(sorted(OPTIMIZERS, key=len)),
        "clip": st.sampled_from([None, 0.1, 100.0]),
        "persistence_threshold": st.sampled_from([0, 0, 4, 1000]),
        "weighted": st.booleans(),
        "remat": st.booleans(),
    }
    values = {
        name: draw(value) if isinstance(value, st.SearchStrategy) else value
        for name, value in {**options, **fixed}.items()
    }
    if values["zero"] != 3:
        values["persistence_threshold"] = 0
    return Recipe(**values)


@st.composite
def batches(
    draw: st.DrawFn,
    /,
    recipe: Recipe,
    mesh_shape: Mapping[str, int],
    *,
    num_steps: int = 2,
    dtype: torch.dtype = torch.float64,
) -> list[dict[str, torch.Tensor]]:
    """One global batch per step, for ``tree_loss``, that the recipe can divide.

    Each microbatch of each rank has 1 to 3 samples.

    Args:
      draw: given by hypothesis.
      recipe: says how many microbatches there are.
      mesh_shape: says how many ranks share a batch.
      num_steps: how many batches.
      dtype: of the floating tensors.

    Example:
      >>> from hypothesis import find, settings
      >>> drawn = batches(Recipe(num_microbatches=2), {"data": 3})
      >>> first, _ = find(drawn, lambda b: True, settings=settings(database=None))
      >>> len(first["y"])
      6
    """
    ranks = mesh_shape.get(recipe.axis, 1)
    samples = draw(st.integers(1, 3)) * ranks * recipe.num_microbatches
    seed = draw(_seeds())
    return [random_batch(samples, seed + i, dtype=dtype) for i in range(num_steps)]


def _seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**16)
