# SPDX-License-Identifier: Apache-2.0
"""``shard`` and ``unshard``: options, aliasing, what a state is made of."""

import copy
from typing import NamedTuple

import pytest
import torch

import zfunc as zf
from tests.unit.core.common import F64, alone, assert_bitwise, one_rank, randn
from zfunc.core.errors import MeshError, PlacementError, StructureError
from zfunc.core.tree import tree_leaves, tree_structure
from zfunc.testing import simulate

TREE = {"b": randn(4, seed=1), "s": randn(), "w": randn(5, 3)}


class Layer(NamedTuple):
    weight: torch.Tensor
    bias: torch.Tensor | None


def specs(state):
    return {k: x.sharding.spec for k, x in state.params.items()}


def test_the_parts_of_a_fresh_state():
    state = zf.shard(TREE, one_rank(), tx=zf.optim.adam(0.1), key=7)
    assert state.step == 0
    assert state.key == 7
    assert state.step.dtype == state.key.dtype == torch.int64
    assert tree_structure(state.grads) == tree_structure(state.params)
    assert all((x == 0).all() for x in tree_leaves(state.grads))
    assert state.metrics.loss == state.metrics.grad_norm == 0
    assert state.metrics.aux == {}
    assert zf.shard(TREE, one_rank()).moments is None


def test_moments_made_up_front_are_those_of_the_first_step():
    tx = zf.optim.adam(0.1)

    def loss(p, b):
        return (p["w"] * b).sum() + p["b"].sum() + p["s"]

    step = zf.train_step(loss, tx)
    early = step(zf.shard(TREE, alone(), tx=tx), torch.ones(()))
    late = step(zf.shard(TREE, alone()), torch.ones(()))
    assert_bitwise(early, late)


def test_the_default_spec_shards_dim_0_and_replicates_scalars():
    assert specs(zf.shard(TREE, one_rank())) == {
        "b": zf.P("data"),
        "s": zf.P(),
        "w": zf.P("data"),
    }
    assert set(specs(zf.shard(TREE, alone())).values()) == {zf.P()}


def test_one_spec_is_cut_to_the_dims_of_each_leaf():
    state = zf.shard(TREE, one_rank(), spec=zf.P(None, "data"))
    assert specs(state) == {"b": zf.P(), "s": zf.P(), "w": zf.P(None, "data")}


def test_a_tree_of_specs_and_a_prefix_of_one():
    wanted = {"b": zf.P(), "s": zf.P(), "w": zf.P(None, "data")}
    assert specs(zf.shard(TREE, one_rank(), spec=wanted)) == wanted
    tree = {"head": randn(2, 2), "layers": [{"w": randn(2, 2)}, {"w": randn(3, 2)}]}
    prefix = {"head": zf.P(None, "data"), "layers": zf.P("data")}
    placed = zf.shard(tree, one_rank(), spec=prefix).params
    assert placed["head"].sharding.spec == zf.P(None, "data")
    assert placed["layers"][1]["w"].sharding.spec == zf.P("data")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_storage_dtype(dtype):
    state = zf.shard(TREE, one_rank(), dtype=dtype, tx=zf.optim.adam(0.1))
    for tree in (state.params, state.grads):
        assert {x.dtype for x in tree_leaves(tree)} == {dtype}
    wide = torch.promote_types(dtype, torch.float32)
    assert {x.dtype for x in tree_leaves(state.moments[1].mu)} == {wide}


def test_without_one_every_leaf_keeps_its_dtype():
    tree = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2, dtype=F64)}
    state = zf.shard(tree, alone())
    assert state.params["a"].buffer.dtype == torch.bfloat16
    assert state.params["b"].buffer.dtype == F64


@pytest.mark.parametrize("mesh", [alone, one_rank])
def test_the_state_has_memory_of_its_own(mesh):
    tree = {k: x.clone() for k, x in TREE.items()}
    state = zf.shard(tree, mesh())
    for x in tree.values():
        x.zero_()
    assert_bitwise(zf.unshard(state).params, TREE)


def test_tied_and_strided_parameters_are_copied():
    w = randn(3, 4)
    state = zf.shard({"a": w, "b": w, "t": w.T, "e": w[:1].expand(3, 4)}, alone())
    buffers = {k: x.buffer for k, x in state.params.items()}
    assert len({x.data_ptr() for x in buffers.values()}) == 4
    assert all(x.is_contiguous() for x in buffers.values())
    assert torch.equal(buffers["t"], w.T)


@pytest.mark.parametrize("mesh", [{}, {"data": 1}])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_parameters_that_are_placed_stay_there_in_memory_of_the_state(mesh, dtype):
    mesh = zf.make_mesh(mesh)
    spec = {"w": zf.P(None, "data"), "b": zf.P()} if mesh.axes else zf.P()
    placed = zf.shard({"w": torch.ones(2, 3), "b": torch.ones(3)}, mesh, spec=spec)
    mixed = {**placed.params, "plain": torch.zeros(4)}
    state = zf.shard(mixed, mesh, dtype=dtype)
    assert state.params["w"].sharding == placed.params["w"].sharding
    default = zf.P("data") if mesh.axes else zf.P()
    assert state.params["plain"].sharding.spec == default
    for name, leaf in placed.params.items():
        assert state.params[name].buffer.dtype == (dtype or torch.float32)
        state.params[name].buffer.zero_()
        assert bool((leaf.buffer == 1).all())


def test_parameters_that_track_gradients_are_detached():
    module = torch.nn.Linear(3, 2)
    state = zf.shard(dict(module.named_parameters()), alone())
    assert not any(x.requires_grad for x in tree_leaves(state))


@pytest.mark.parametrize(
    "tree",
    [
        randn(3),
        (randn(3), [randn(2), None]),
        Layer(randn(2, 2), None),
        {"layers": [Layer(randn(2, 2), randn(2))] * 2, "none": None},
    ],
    ids=["tensor", "tuple", "namedtuple", "nested"],
)
def test_any_pytree(tree):
    state = zf.shard(tree, one_rank())
    assert tree_structure(zf.unshard(state).params) == tree_structure(tree)
    assert_bitwise(zf.unshard(state).params, tree)


def test_uneven_leaves_are_padded_with_zeros_in_params_and_moments():
    sim = simulate(None, {"data": 4})
    state = sim.shard({"w": torch.ones(5, 2)}, tx=zf.optim.adam(0.1))
    assert state.params["w"].buffer.shape == (4, 2, 2)
    assert state.params["w"].buffer.sum(dim=(1, 2)).tolist() == [4, 4, 2, 0]
    assert state.moments[1].mu["w"].buffer.shape == (4, 2, 2)
    assert torch.equal(sim.unshard(state).params["w"], torch.ones(5, 2))


def test_replace_changes_one_field():
    state = zf.shard(TREE, alone())
    other = state.replace(moments=())
    assert other.moments == ()
    assert other.params is state.params
    assert state.moments is None


def test_a_state_is_frozen():
    state = zf.shard(TREE, alone())
    with pytest.raises(AttributeError):
        state.step = 3


def test_a_state_is_a_pytree_that_copies():
    state = zf.shard(TREE, alone(), tx=zf.optim.adam(0.1))
    assert_bitwise(zf.tree_map(torch.clone, state), state)
    assert_bitwise(copy.copy(state), state)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, torch.tensor(5)])
def test_keys(seed):
    assert int(zf.shard(TREE, alone(), key=seed).key) == int(seed)


@pytest.mark.parametrize("seed", [1.5, "a", None])
def test_keys_that_are_no_integers(seed):
    with pytest.raises(TypeError):
        zf.shard(TREE, alone(), key=seed)


# --- Mean ---------------------------------------------------------------------


def test_mean_of_nothing_is_zero():
    assert zf.Mean(torch.tensor(0.0), torch.tensor(0)).value() == 0
    assert zf.Mean(torch.tensor(3.0), torch.tensor(2)).value() == 1.5


def test_means_add_up():
    a = zf.Mean(torch.tensor(6.0), torch.tensor(3.0))
    b = zf.Mean(torch.tensor(1.0), torch.tensor(7.0))
    assert torch.allclose(zf.tree_map(torch.add, a, b).value(), torch.tensor(0.7))


# --- misuse -------------------------------------------------------------------


@pytest.mark.parametrize("tree", [{}, None, {"a": None}, []])
def test_parameters_without_a_leaf(tree):
    with pytest.raises((TypeError, ValueError), match="no leaves"):
        zf.shard(tree, alone())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"spec": zf.P("model")}, MeshError),
        ({"spec": "data"}, PlacementError),
        ({"spec": {"w": zf.P()}}, StructureError),
        ({"spec": {"b": zf.P(None, "data"), "s": zf.P(), "w": zf.P()}}, PlacementError),
        ({"dtype": torch.int32}, TypeError),
        ({"dtype": "bf16"}, TypeError),
        ({"tx": 3}, TypeError),
        ({"tx": zf.optim.sgd}, TypeError),
    ],
)
def test_options_that_do_not_fit(options, error):
    with pytest.raises(error):
        zf.shard(TREE, one_rank(), **options)


@pytest.mark.parametrize("mesh", [{"data": 1}, None, 1])
def test_something_that_is_no_mesh(mesh):
    with pytest.raises(TypeError, match="mesh"):
        zf.shard(TREE, mesh)


def test_real_tensors_on_a_mesh_without_ranks():
    """They would be cut into buffers that nobody fills."""
    with pytest.raises((MeshError, PlacementError), match="abstract"):
        zf.shard(TREE, zf.AbstractMesh({"data": 2}))


def test_a_fake_state_on_a_mesh_without_ranks():
    state = zf.shard(zf.abstract(TREE), zf.AbstractMesh({"data": 2}))
    assert state.params["w"].buffer.shape == (3, 3)
