# SPDX-License-Identifier: Apache-2.0
"""Law 13: a checkpoint of mesh A restores on mesh B.

The ranks of a mesh run one after the other here, through what ``save`` and ``restore``
run between their agreements; real ranks are in tests/distributed.
"""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.checkpoint.states import contents, saved_by_ranks, state_on
from zfunc.checkpoint import layout, list_steps, manifest, verify
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import P

RESTORE = sys.modules["zfunc.checkpoint.restore"]
AXES = ("data", "tensor", "expert")


@st.composite
def meshes(draw):
    sizes = draw(
        st.lists(st.integers(1, 4), max_size=3).filter(lambda s: math.prod(s) < 9)
    )
    return tuple(zip(AXES, sizes, strict=False))


def specs(axes, num_dims):
    """Every way to put some of the axes on some of the dims."""
    entries = st.lists(
        st.sampled_from([None, *[name for name, _ in axes]]),
        max_size=num_dims,
    )
    named = entries.filter(
        lambda e: len([x for x in e if x]) == len({x for x in e if x})
    )
    return named.map(lambda e: P(*e))


SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@given(data=st.data())
@settings(max_examples=60)
def test_a_checkpoint_of_one_mesh_restores_on_another(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("mesh")
    one, two = data.draw(meshes(), "saved on"), data.draw(meshes(), "restored on")
    shapes = data.draw(st.lists(SHAPES, min_size=1, max_size=3), "shapes")
    full = [torch.randn(shape) + 10 for shape in shapes]
    before = [data.draw(specs(one, len(shape))) for shape in shapes]
    after = [data.draw(specs(two, len(shape))) for shape in shapes]
    directory = saved_by_ranks(root, one, full, before)
    found, _ = manifest.read_manifest(directory)
    verify.check_directory(directory, found)
    for rank in range(found.num_ranks):
        verify.check_file(directory, found, rank, hashed=True)
    for rank in range(math.prod(n for _, n in two)):
        mesh = Mesh(two, "process", rank=rank)
        like = state_on(two, rank, [torch.zeros_like(x) for x in full], after)
        got = RESTORE._load(directory, found, like, mesh)
        assert contents(got) == contents(state_on(two, rank, full, after))


@given(data=st.data())
@settings(max_examples=200)
def test_sources_cover_a_region_exactly_once(data):
    axes, shape = data.draw(meshes()), data.draw(SHAPES)
    spec = data.draw(specs(axes, len(shape)))
    region = []
    for d in shape:
        start = data.draw(st.integers(0, d))
        region.append((start, data.draw(st.integers(start, d))))
    count = torch.zeros([b - a for a, b in region])
    for box in layout.sources(axes, spec, shape, region):
        assert layout.is_stored_by(axes, spec, box.rank)
        held = layout.held_region(axes, spec, shape, box.rank)
        for (a, _), (low, high), taken, put in zip(
            region, held, box.source, box.target, strict=True
        ):
            assert taken.stop - taken.start == put.stop - put.start > 0
            assert low + taken.start == a + put.start
            assert low + taken.stop <= high
        count[box.target] += 1
    assert bool((count == 1).all())


@given(axes=meshes(), data=st.data())
def test_every_element_is_stored_once(axes, data):
    shape = data.draw(SHAPES)
    spec = data.draw(specs(axes, len(shape)))
    count = torch.zeros(shape)
    for rank in range(math.prod(n for _, n in axes)):
        assert layout.rank_at(axes, layout.coordinates(axes, rank)) == rank
        if layout.is_stored_by(axes, spec, rank):
            held = layout.held_region(axes, spec, shape, rank)
            count[tuple(slice(a, b) for a, b in held)] += 1
    assert bool((count == 1).all())


def short(boxes):
    return boxes[:-1]


def unmoved(boxes):
    return [
        box._replace(target=tuple(slice(0, s.stop - s.start) for s in box.target))
        for box in boxes
    ]


def reread(boxes):
    return [
        box._replace(source=tuple(slice(0, s.stop - s.start) for s in box.source))
        for box in boxes
    ]


def swapped(boxes):
    return [box._replace(rank=1 - box.rank) for box in boxes]


@pytest.mark.parametrize("mutant", [None, short, unmoved, reread, swapped])
def test_wrong_arithmetic_gives_other_values(tmp_path, monkeypatch, mutant):
    one, two, full = (("data", 2),), (("data", 3),), [torch.randn(10)]
    directory = saved_by_ranks(tmp_path, one, full, [P("data")])
    found, _ = manifest.read_manifest(directory)
    real = layout.sources

    def wrong(axes, spec, shape, region):
        boxes = list(real(axes, spec, shape, region))
        return mutant(boxes) if shape and mutant else boxes

    monkeypatch.setattr(RESTORE, "sources", wrong)
    like, expected = (
        state_on(two, 1, x, [P("data")]) for x in ([torch.zeros(10)], full)
    )
    got = RESTORE._load(directory, found, like, Mesh(two, "process", rank=1))
    assert (contents(got) == contents(expected)) == (mutant is None)


def test_a_rank_reads_only_what_it_needs(tmp_path, monkeypatch):
    full = [torch.arange(12.0).view(12, 1), torch.arange(5.0)]
    axes = (("data", 4),)
    directory = saved_by_ranks(tmp_path, axes, full, [P("data"), P("data")])
    found, _ = manifest.read_manifest(directory)
    opened = []
    read_boxes = RESTORE._read_boxes

    def recording(file, boxes, buffers):
        opened.append(
            (file.name, [box.source for path, box in boxes if "params/0" in path])
        )
        read_boxes(file, boxes, buffers)

    monkeypatch.setattr(RESTORE, "_read_boxes", recording)
    two = (("data", 2),)
    like = state_on(two, 1, full, [P("data"), P("data")])
    RESTORE._load(directory, found, like, Mesh(two, "process", rank=1))
    whole = (slice(0, 3), slice(0, 1))
    assert opened == [
        ("rank-00000.safetensors", []),  # step, key and metrics
        ("rank-00001.safetensors", []),  # element 3 of the second leaf
        ("rank-00002.safetensors", [whole]),
        ("rank-00003.safetensors", [whole]),
    ]


def test_a_replicated_leaf_is_stored_once(tmp_path):
    axes = (("data", 2), ("tensor", 2))
    full = [torch.randn(4, 6), torch.randn(3), torch.randn(8)]
    directory = saved_by_ranks(
        tmp_path, axes, full, [P("data", "tensor"), P(), P("tensor")]
    )
    found, _ = manifest.read_manifest(directory)
    names = [
        [
            leaf.path
            for leaf in manifest.stored_leaves(found, rank)
            if "params" in leaf.path
        ]
        for rank in range(4)
    ]
    assert names == [
        ["params/0", "params/1", "params/2"],
        ["params/0", "params/2"],
        ["params/0"],
        ["params/0"],
    ]
    assert list_steps(tmp_path) == (3,)


@pytest.mark.parametrize("missing", range(3))
def test_a_file_of_another_rank_is_missed(tmp_path, missing):
    axes = (("data", 3),)
    directory = saved_by_ranks(tmp_path, axes, [torch.randn(7)], [P("data")])
    found, _ = manifest.read_manifest(directory)
    (directory / manifest.file_name(missing)).unlink()
    with pytest.raises(
        zf.CheckpointError, match=rf"missing 'rank-0000{missing}.safeten"
    ):
        verify.check_directory(directory, found)
    with pytest.raises(zf.CheckpointError, match=rf"rank-0000{missing}.*: missing"):
        verify.check_file(directory, found, missing, hashed=True)
