# SPDX-License-Identifier: Apache-2.0
"""Meshes: coordinates, equality, what cannot be made."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from zfunc.core.errors import MeshError
from zfunc.core.mesh import Mesh
from zfunc.testing import spmd

SHAPES = st.dictionaries(
    st.sampled_from(["data", "tensor", "pipe"]), st.integers(1, 5), max_size=3
)


@given(SHAPES)
def test_ranks_are_row_major_over_the_axes(shape):
    mesh = zf.AbstractMesh(shape)
    assert mesh.shape == shape
    assert mesh.size == math.prod(shape.values())
    coordinates = itertools.product(*[range(n) for n in shape.values()])
    for rank, expected in enumerate(coordinates):
        here = Mesh(mesh.axes, "abstract", rank=rank)
        assert tuple(here.axis_index(axis) for axis in shape) == expected


@given(st.dictionaries(st.sampled_from("ab"), st.integers(1, 3), min_size=1))
def test_a_simulated_mesh_has_the_same_coordinates(shape):
    mesh = zf.AbstractMesh(shape)
    ranks = torch.arange(mesh.size)
    for axis in shape:
        got = spmd(lambda m, _, axis=axis: zf.axis_index(axis, m), shape)(ranks)
        want = [
            Mesh(mesh.axes, "abstract", rank=int(r)).axis_index(axis) for r in ranks
        ]
        assert got.tolist() == want
        assert got.dtype == torch.int64


def test_the_rank_is_data_and_not_identity():
    first = Mesh((("data", 2),), "process", rank=0, groups=("1",))
    second = Mesh((("data", 2),), "process", rank=1, groups=("2",))
    assert first == second
    assert hash(first) == hash(second)


def test_axes_kind_and_device_are_identity():
    base = Mesh((("data", 2),), "process")
    for other in (
        Mesh((("data", 3),), "process"),
        Mesh((("tensor", 2),), "process"),
        Mesh((("data", 2),), "abstract"),
        Mesh((("data", 2),), "process", "cuda"),
    ):
        assert base != other


def test_a_mesh_is_frozen_and_copies():
    mesh = zf.make_mesh({"data": 1})
    with pytest.raises(AttributeError):
        mesh.rank = 3
    assert copy.deepcopy(mesh) == mesh
    assert pickle.loads(pickle.dumps(mesh)) == mesh


def test_one_rank_needs_no_process_group():
    assert zf.make_mesh({}).kind == "local"
    assert zf.make_mesh({"data": 1, "tensor": 1}).size == 1
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "axes",
    [[2], "data", 2, None, {0: 1}, {"da ta": 1}, {"": 1}]
    + [{"data": size} for size in (0, -1, 1.0, True, "2", None)],
)
@pytest.mark.parametrize("make", [zf.make_mesh, zf.AbstractMesh])
def test_bad_axes(make, axes):
    with pytest.raises(MeshError):
        make(axes)


def test_a_size_that_is_not_the_jobs(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(MeshError, match="has 2 ranks but this job has 4"):
        zf.make_mesh({"data": 2})
    with pytest.raises(MeshError, match="has 1 ranks but this job has 4"):
        zf.make_mesh({"data": 1})
    assert zf.make_mesh({}).size == 1
    assert not torch.distributed.is_initialized()


def test_an_axis_that_the_mesh_does_not_have():
    mesh = zf.AbstractMesh({"data": 2, "tensor": 3})
    for use in (mesh.axis_size, mesh.axis_index, mesh.axis_position, mesh.group):
        with pytest.raises(MeshError, match="its axes: 'data', 'tensor'"):
            use("model")
    with pytest.raises(MeshError, match="its axes: none"):
        zf.make_mesh({}).axis_size("data")
