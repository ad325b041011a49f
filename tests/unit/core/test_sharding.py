# SPDX-License-Identifier: Apache-2.0
"""Placement: specs, padding, moving between layouts, norms over all ranks."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.core.common import F64, alone, one_rank, randn, whole_numbers
from zfunc.core.errors import MeshError, PlacementError
from zfunc.core.sharding import gather_buffers, place, replicate, scatter_sum_buffers
from zfunc.testing import simulate, spmd
from zfunc.testing.strategies import meshes, shapes

SPECS = [
    zf.P(),
    zf.P("data"),
    zf.P(None, "data"),
    zf.P("tensor"),
    zf.P("data", "tensor"),
    zf.P("tensor", "data"),
]
TWO_AXES = {"data": 2, "tensor": 3}


def stacked(x, n):
    return x.expand(n, *x.shape)


def size_of(shape):
    return zf.AbstractMesh(shape).size


# --- P and NamedSharding ------------------------------------------------------


def test_trailing_nones_do_not_matter():
    assert zf.P("data", None, None) == zf.P("data")
    assert hash(zf.P("data", None)) == hash(zf.P("data"))
    assert zf.P(None, None) == zf.P()
    assert zf.P(None, "data") != zf.P("data")


@pytest.mark.parametrize("spec", SPECS)
def test_a_spec_prints_as_it_is_written(spec):
    assert eval(repr(spec), {"P": zf.P}) == spec


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickled])
def test_a_spec_survives_a_copy(duplicate):
    for spec in SPECS:
        assert duplicate(spec) == spec
        assert type(duplicate(spec)) is zf.P


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_placed_state_survives_a_copy(duplicate):
    state = zf.shard({"w": torch.ones(3)}, one_rank(), tx=zf.optim.adam(0.1))
    other = duplicate(state)
    assert zf.core.tree.tree_structure(other) == zf.core.tree.tree_structure(state)


def test_a_placed_state_can_be_saved(tmp_path):
    state = zf.shard({"w": torch.ones(3)}, one_rank())
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=False)
    assert torch.equal(loaded.params["w"].buffer, torch.ones(3))


@pytest.mark.parametrize("entries", [(("data", "tensor"),), (0,), (["data"],)])
def test_entries_that_are_not_names(entries):
    with pytest.raises(PlacementError, match="one axis name or None per dim"):
        zf.P(*entries)


def test_an_axis_shards_one_dim_only():
    with pytest.raises(PlacementError, match="an axis can shard one dim only"):
        zf.P("data", "data")


def test_a_sharding_checks_its_axes_and_memory():
    mesh = zf.AbstractMesh({"data": 2})
    with pytest.raises(MeshError, match="'model' is not an axis"):
        zf.NamedSharding(mesh, zf.P("model"))
    with pytest.raises(PlacementError, match="'pinned_host' is not supported"):
        zf.NamedSharding(mesh, zf.P(), "pinned_host")


@given(st.lists(st.integers(0, 9), min_size=2, max_size=3), st.sampled_from(SPECS))
def test_local_shapes_are_rounded_up(global_shape, spec):
    sharding = zf.NamedSharding(zf.AbstractMesh(TWO_AXES), spec)
    for dim, (d, local) in enumerate(
        zip(global_shape, sharding.local_shape(global_shape), strict=True)
    ):
        axis = spec[dim] if dim < len(spec) else None
        n = TWO_AXES[axis] if axis else 1
        assert local == math.ceil(d / n)


# --- place and replicate ------------------------------------------------------


@st.composite
def placements(draw):
    shape = draw(meshes(max_ranks=4))
    size = draw(shapes())
    axes = draw(st.permutations([*shape, *[None] * (len(size) - len(shape))]))
    entries = [draw(st.sampled_from([a, None])) for a in axes[: len(size)]]
    return shape, size, zf.P(*entries)


@given(placements())
def test_place_then_replicate_is_the_identity(case):
    shape, size, spec = case
    full = randn(*size)

    def there_and_back(mesh, x):
        return replicate(place(x, zf.NamedSharding(mesh, spec)))

    ranks = size_of(shape)
    got = spmd(there_and_back, shape)(stacked(full, ranks))
    assert torch.equal(got, stacked(full, ranks))


@given(placements())
def test_the_pieces_tile_the_tensor_and_the_tail_is_zero(case):
    shape, size, spec = case
    full = 1 + randn(*size).abs()

    def pieces(mesh, x):
        leaf = place(x, zf.NamedSharding(mesh, spec))
        assert tuple(leaf.buffer.shape) == leaf.sharding.local_shape(size)
        assert leaf.global_shape == tuple(size)
        return leaf.buffer

    buffers = spmd(pieces, shape)(stacked(full, size_of(shape)))
    copies = 1
    for axis, n in shape.items():
        copies *= 1 if axis in spec else n
    torch.testing.assert_close(buffers.sum(), copies * full.sum())
    assert (buffers != 0).sum() == copies * full.numel()


@settings(max_examples=50)
@given(placements(), st.integers(0, 9))
def test_replicate_is_differentiable(case, seed):
    """Each rank's piece of the sum over ranks of the cotangents; zero in the tail."""
    shape, size, spec = case
    ranks = size_of(shape)
    x, c = whole_numbers(*size), whole_numbers(ranks, *size, seed=seed)

    def pulled(mesh, x, c):
        leaf = place(x, zf.NamedSharding(mesh, spec))

        def full(buffer):
            return replicate(zf.Sharded(buffer, leaf.sharding, leaf.global_shape))

        return torch.func.vjp(full, leaf.buffer)[1](c)[0]

    def want(mesh, x, c):
        total = c
        for axis in spec:
            total = total if axis is None else zf.psum(total, axis, mesh)
        return place(total, zf.NamedSharding(mesh, spec)).buffer

    args = (stacked(x, ranks), c)
    assert torch.equal(spmd(pulled, shape)(*args), spmd(want, shape)(*args))


def test_more_entries_than_dims():
    sharding = zf.NamedSharding(zf.AbstractMesh({"data": 2}), zf.P(None, "data"))
    with pytest.raises(PlacementError, match="2 entries but the tensor has shape"):
        place(torch.ones(3), sharding)


def test_an_axis_of_one_rank_changes_nothing():
    x = randn(3, 2)
    leaf = place(x, zf.NamedSharding(one_rank(), zf.P("data")))
    assert torch.equal(leaf.buffer, x)
    assert torch.equal(replicate(leaf), x)


# --- reshard ------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), list(itertools.product(SPECS, SPECS)))
def test_reshard_keeps_the_value_and_transposes(source, target):
    full = whole_numbers(3, 4)  # uneven over both axes

    def moved(mesh, buffer):
        leaf = zf.Sharded(buffer, zf.NamedSharding(mesh, source), (3, 4))
        return zf.reshard(leaf, zf.NamedSharding(mesh, target))

    def start(mesh, x):
        return place(x, zf.NamedSharding(mesh, source)).buffer

    ranks = stacked(full, 6)
    x = spmd(start, TWO_AXES)(ranks)
    got = spmd(lambda m, b: replicate(moved(m, b)), TWO_AXES)(x)
    assert torch.equal(got, ranks)
    y = whole_numbers(*spmd(lambda m, b: moved(m, b).buffer, TWO_AXES)(x).shape, seed=1)

    def transposed(mesh, x, y):
        return torch.func.vjp(lambda b: moved(mesh, b).buffer, x)[1](y)[0]

    any_x = whole_numbers(*x.shape, seed=2)  # also where the padding is
    forward = spmd(lambda m, b: moved(m, b).buffer, TWO_AXES)(any_x)
    back = spmd(transposed, TWO_AXES)(any_x, y)
    assert (forward * y).sum() == (any_x * back).sum()


def test_reshard_of_a_tree_takes_a_prefix():
    mesh = one_rank()
    tree = {"a": {"x": randn(2), "y": randn(3)}, "b": randn(4), "none": None}
    split, whole = zf.NamedSharding(mesh, zf.P("data")), zf.NamedSharding(mesh, zf.P())
    moved = zf.reshard(tree, {"a": split, "b": whole, "none": None})
    assert moved["a"]["x"].sharding == moved["a"]["y"].sharding == split
    assert moved["b"].sharding == whole
    assert moved["none"] is None
    back = replicate(zf.reshard(moved, whole))
    assert torch.equal(back["a"]["y"], tree["a"]["y"])


def test_reshard_does_not_cross_meshes():
    placed = zf.shard({"w": torch.ones(2)}, one_rank()).params
    with pytest.raises(
        PlacementError, match=r"w: cannot move from mesh .* inside a pr"
    ):
        zf.reshard(placed, zf.NamedSharding(alone(), zf.P()))


# --- groups of leaves ---------------------------------------------------------


def test_gather_and_scatter_are_transposes_with_their_own_dtypes():
    full = torch.tensor([1.001, 2.0, 3.0])

    def run(mesh, x):
        leaf = place(x, zf.NamedSharding(mesh, zf.P("data")))
        wide = gather_buffers([leaf], "data", wire_dtypes=[torch.bfloat16])[0]
        part = scatter_sum_buffers(
            [wide.float()], [leaf], "data", reduce_dtype=torch.bfloat16
        )[0]
        return wide, part

    wide, part = spmd(run, {"data": 2})(stacked(full, 2))
    assert wide.dtype == torch.float32
    assert torch.equal(wide[0], full.to(torch.bfloat16).float())
    assert part.dtype == torch.float32
    assert part.tolist() == [[2.0, 4.0], [6.0, 0.0]]


def test_leaves_sharded_over_different_dims_gather_together():
    tree = {"a": randn(3, 4), "b": randn(4, 3, seed=1), "c": randn(5, seed=2)}
    specs = {"a": zf.P("data"), "b": zf.P(None, "data"), "c": zf.P()}

    def run(mesh, tree):
        placed = {
            k: place(x, zf.NamedSharding(mesh, specs[k])) for k, x in tree.items()
        }
        return replicate(placed)

    ranks = {k: stacked(x, 2) for k, x in tree.items()}
    got = spmd(run, {"data": 2})(ranks)
    assert all(torch.equal(got[k], ranks[k]) for k in tree)


# --- global_norm --------------------------------------------------------------


@given(
    st.lists(shapes(), min_size=1, max_size=4),
    meshes(max_ranks=4),
    st.sampled_from([zf.P(), zf.P("data")]),
)
def test_the_norm_is_torchs_and_the_same_on_every_rank(sizes, shape, spec):
    tree = {str(i): randn(*size, seed=i) for i, size in enumerate(sizes)}
    want = torch.linalg.vector_norm(torch.cat([x.reshape(-1) for x in tree.values()]))
    state = simulate(None, shape).shard(tree, spec=spec)
    norms = spmd(lambda m, s: zf.global_norm(s.params), shape)(state)
    torch.testing.assert_close(norms[0], want, rtol=1e-12, atol=0)
    assert (norms == norms[0]).all()
    torch.testing.assert_close(zf.global_norm(tree), want, rtol=1e-12, atol=0)


def test_a_mix_of_placements_counts_every_element_once():
    tree = {"a": randn(5, 4), "b": randn(4, 3, seed=1), "c": randn(7, seed=2)}
    specs = {"a": zf.P("data", "tensor"), "b": zf.P("tensor"), "c": zf.P()}
    state = simulate(None, TWO_AXES).shard(tree, spec=specs)
    norms = spmd(lambda m, s: zf.global_norm(s.params), TWO_AXES)(state)
    want = sum(x.square().sum() for x in tree.values()).sqrt()
    torch.testing.assert_close(norms, want.expand(6), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_the_norm_adds_up_in_float32_at_least(dtype):
    x = torch.full((300,), 100.0, dtype=dtype)  # its sum of squares overflows float16
    norm = zf.global_norm({"x": x})
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(norm.double(), x.double().norm(), rtol=1e-6, atol=0)


def test_the_norm_of_nothing_is_zero():
    assert zf.global_norm({}) == 0
    assert zf.global_norm({"none": None, "empty": torch.ones(0, 3)}) == 0
