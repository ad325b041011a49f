# SPDX-License-Identifier: Apache-2.0
"""Pytrees: order, None, paths, structure errors."""

import collections
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.core.common import alone, one_rank
from zfunc.core.errors import StructureError
from zfunc.core.tree import (
    broadcast_prefix,
    check_floating,
    check_structure,
    leaves_with_path,
    map_with_path,
    pytree,
    static,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
)

TREES = st.recursive(
    st.one_of(st.integers(), st.none()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("abcd"), inner, max_size=3),
    ),
    max_leaves=8,
)


class Pair(NamedTuple):
    first: object
    second: object


@pytree
class Box:
    content: object
    label: str = static(default="")


@given(TREES)
def test_flatten_then_unflatten_is_the_identity(tree):
    leaves, spec = tree_flatten(tree)
    assert tree_unflatten(spec, leaves) == tree
    assert None not in leaves
    assert tree_leaves(tree) == leaves
    assert tree_structure(tree) == spec


@given(TREES)
def test_paths_are_one_per_leaf_in_order(tree):
    pairs = leaves_with_path(tree)
    assert [leaf for _, leaf in pairs] == tree_leaves(tree)
    paths = [path for path, _ in pairs]
    assert len(set(paths)) == len(paths)
    assert tree_leaves(map_with_path(lambda path, _: path, tree)) == paths


@given(TREES)
def test_tree_map_keeps_structure_and_composes(tree):
    doubled = tree_map(lambda x: 2 * x, tree)
    assert tree_structure(doubled) == tree_structure(tree)
    assert tree_map(lambda x: x // 2, doubled) == tree
    assert tree_map(lambda a, b: b - a, tree, doubled) == tree


def test_dictionaries_are_in_key_order_and_ordered_ones_in_theirs():
    assert tree_leaves({"b": 1, "a": 2}) == [2, 1]
    assert tree_leaves(collections.OrderedDict(b=1, a=2)) == [1, 2]


def test_named_tuples_and_nested_nodes_keep_their_types():
    tree = Pair(Box([1, None], "x"), {"k": 2})
    doubled = tree_map(lambda x: 2 * x, tree)
    assert doubled == Pair(Box([2, None], "x"), {"k": 4})
    assert type(doubled.first) is Box


def test_static_fields_are_structure():
    assert tree_structure(Box(1, "m")) != tree_structure(Box(1, "km"))
    assert tree_structure(Box(1, "m")) == tree_structure(Box(2, "m"))


def test_a_pytree_dataclass_is_frozen():
    with pytest.raises(AttributeError):
        Box(1).content = 2


def test_is_leaf_stops():
    assert tree_leaves([(1, 2), (3,)], lambda x: isinstance(x, tuple)) == [(1, 2), (3,)]


@pytest.mark.parametrize(
    ("other", "lines"),
    [
        ({"a": 1}, ["  missing: b/0"]),
        ({"a": 1, "b": [2], "c": 3}, ["  not expected: c"]),
        ({"x": 1, "b": [2]}, ["  missing: a", "  not expected: x"]),
        ({"a": 1, "b": [2, 3]}, ["  not expected: b/1"]),
    ],
)
def test_structure_errors_name_the_paths(other, lines):
    with pytest.raises(StructureError) as caught:
        tree_map(lambda a, b: a, {"a": 1, "b": [2]}, other)
    assert str(caught.value).splitlines()[1:-1] == lines


def test_structure_errors_of_equal_paths_show_both_structures():
    with pytest.raises(StructureError) as caught:
        check_structure((1, 2), [1, 2], "grads", "Do this.")
    first, expected, got, remedy = str(caught.value).splitlines()
    assert first == "grads does not have the structure that is needed here:"
    assert "expected" in expected
    assert "(*, *)" in expected
    assert "[*, *]" in got
    assert remedy == "Do this."


def test_structure_errors_name_a_placement_that_differs():
    placed = zf.shard({"w": torch.ones(2)}, one_rank()).params
    whole = zf.shard({"w": torch.ones(2)}, one_rank(), spec=zf.P()).params
    with pytest.raises(StructureError, match=r"w: expected .*P\('data'\).*got .*P\(\)"):
        tree_map(torch.add, placed, whole)


def test_long_lists_of_paths_are_cut():
    with pytest.raises(StructureError) as caught:
        tree_map(lambda a, b: a, {str(i): 0 for i in range(100)}, {})
    assert len(str(caught.value).splitlines()) == 10


def test_broadcast_prefix_serves_subtrees():
    assert broadcast_prefix(7, {"a": [1, 2], "b": 3}) == [7, 7, 7]
    assert broadcast_prefix({"a": 1, "b": 2}, {"a": [0, None, 0], "b": 0}) == [1, 1, 2]
    with pytest.raises(StructureError, match="not a prefix of the tree"):
        broadcast_prefix({"a": 1}, {"b": 2})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_leaves_pass(dtype):
    check_floating({"w": torch.ones(2, dtype=dtype), "none": None}, "params")


@pytest.mark.parametrize(
    "leaf", [torch.arange(2), torch.ones(2, dtype=torch.complex64), 1.0, "w", True]
)
def test_leaves_that_cannot_be_differentiated_are_named(leaf):
    with pytest.raises(TypeError, match=r"params\['layers/1'\] is "):
        check_floating({"layers": [torch.ones(1), leaf]}, "params")


def test_a_placed_tree_maps_over_its_buffers():
    placed = zf.shard({"w": torch.ones(3, 2)}, alone()).params
    doubled = tree_map(lambda x: 2 * x, placed)
    assert tree_structure(doubled) == tree_structure(placed)
    assert torch.equal(doubled["w"].buffer, torch.full((3, 2), 2.0))
