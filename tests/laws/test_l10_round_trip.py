# SPDX-License-Identifier: Apache-2.0
"""L10: every pytree round-trips: flattening, mapping and looking from another rank."""

import importlib
import pkgutil

import pytest
import torch
from hypothesis import given

import zfunc as zf
from tests.laws.cases import cases, examples
from zfunc.core.sharding import is_sharded
from zfunc.core.tree import (
    leaves_with_path,
    map_with_path,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)
from zfunc.testing import random_tree
from zfunc.testing.recipe import OPTIMIZERS
from zfunc.transforms.gathered import with_rank

# Packages that this law does not import: they need tools that may be absent.
OUTSIDE = ("zfunc.cli", "zfunc.kernels", "zfunc.launch")


def pytree_classes():
    """Every class of zfunc that was made a pytree by ``core.tree.pytree``."""
    found = {}
    for module in pkgutil.walk_packages(zf.__path__, "zfunc."):
        if module.name.startswith(OUTSIDE):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and "__optree_dataclass_fields__" in vars(value):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return [found[name] for name in sorted(found)]


def same(a, b):
    """One structure, and the very same leaves."""
    return tree_structure(a) == tree_structure(b) and all(
        x is y for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True)
    )


def check(tree):
    leaves, spec = tree_flatten(tree)
    assert same(tree_unflatten(spec, leaves), tree)
    assert same(tree_map(lambda x: x, tree), tree)
    assert same(map_with_path(lambda path, x: x, tree), tree)
    assert hash(tree_structure(tree)) == hash(tree_structure(tree_map(id, tree)))
    paths = [path for path, _ in leaves_with_path(tree)]
    assert len(set(paths)) == len(paths) == len(leaves) == spec.num_leaves
    # An unequal leaf is no structure, an unequal placement is.
    assert tree_structure(tree_map(lambda x: 0, tree)) == spec


def check_ranks(tree):
    """Where a tree is looked at from is neither in its structure nor in its leaves."""
    seen = with_rank(tree, 3)
    assert same(seen, tree)
    assert same(with_rank(seen, 0), tree)
    for leaf in tree_leaves(seen, is_sharded):
        if is_sharded(leaf):
            assert leaf.sharding.mesh.rank == 3


@examples(0.5)
@given(cases(num_steps=1))
def test_states_round_trip(case):
    for state in (case.shard(), case.train()):
        check(state)
        check_ranks(state)
        for name in ("params", "grads", "moments", "metrics"):
            check(getattr(state, name))


@pytest.mark.parametrize("cls", pytree_classes(), ids=lambda cls: cls.__qualname__)
def test_every_pytree_class_round_trips(cls):
    """Whatever the static fields hold, they are part of the structure."""
    fields = cls.__dataclass_fields__
    children = [n for n, f in fields.items() if f.metadata.get("pytree_node", True)]
    static = [n for n in fields if n not in children]
    assert children, "a pytree without leaves is a constant"
    values = {n: torch.tensor(float(i)) for i, n in enumerate(children)}
    made = cls(**values, **dict.fromkeys(static, "one"))
    check(made)
    assert [type(made)] == [type(tree_map(torch.neg, made))]
    assert [getattr(made, n) for n in children] == tree_leaves(made)
    for name in static:
        other = cls(**values, **{**dict.fromkeys(static, "one"), name: "two"})
        assert tree_structure(other) != tree_structure(made)
    with pytest.raises(AttributeError):
        setattr(made, children[0], 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_round_trip(name):
    params = random_tree({"w": torch.Size([3, 2]), "b": [torch.Size([])]}, seed=0)
    mesh = zf.make_mesh({"data": 1})
    check(zf.shard(params, mesh, tx=OPTIMIZERS[name]()).moments)
