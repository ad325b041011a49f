# SPDX-License-Identifier: Apache-2.0
"""The laws of one optimizer at a time, of which the other files draw few examples.

L1 at every stage, L2, L6, L7, L11 in float64 and bfloat16, L13, and L15.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws import test_l1_commuting_square as l1
from tests.laws import test_l2_placement as l2
from tests.laws import test_l6_resume as l6
from tests.laws import test_l7_donate as l7
from tests.laws import test_l11_moments as l11
from tests.laws import test_l15_jit as l15
from tests.laws.cases import assert_bitwise, cases, examples
from tests.unit.checkpoint import states
from tests.unit.checkpoint import test_any_mesh as l13
from zfunc.checkpoint import manifest
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import NamedSharding, P, is_sharded, place
from zfunc.core.tree import tree_leaves, tree_map
from zfunc.testing.recipe import OPTIMIZERS

# Those that most examples of the other files are about, and their unit tests.
COMMON = ("sgd", "momentum", "nesterov", "adam", "adamw")
NAMES = [name for name in OPTIMIZERS if name not in COMMON]
every_optimizer = pytest.mark.parametrize("name", NAMES)


@every_optimizer
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@examples(0.02)
@given(data=st.data())
def test_l1_sharded_training_is_unsharded_training(name, zero, data):
    l1.check(data.draw(cases(optimizer=name, zero=zero)))


@every_optimizer
@examples(0.02)
@given(data=st.data())
def test_l2_a_step_keeps_placement(name, data):
    l2.check(data.draw(cases(optimizer=name)))


@every_optimizer
@examples(0.02)
@given(data=st.data(), cut=st.integers(0, 3))
def test_l6_resuming_is_not_stopping(name, data, cut):
    l6.check(data.draw(cases(optimizer=name, num_steps=3)), cut, None)


@every_optimizer
@examples(0.01)
@given(data=st.data())
def test_l7_donating_changes_no_bit(name, data):
    l7.check_simulated(data.draw(cases(optimizer=name)))
    l7.check_shared(data.draw(cases(optimizer=name, mesh_shapes=l7.ONE_RANK)), zf.jit)


@every_optimizer
@examples(0.02)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.bfloat16]))
def test_l11_moments_of_pieces_are_pieces_of_moments(name, data, dtype):
    case = data.draw(cases(optimizer=name, num_steps=1, dtype=dtype))
    l11.check(case, case.recipe.tx())


@every_optimizer
@examples(0.01)
@given(data=st.data())
def test_l15_jitted_is_eager(name, data):
    case = data.draw(cases(optimizer=name, mesh_shapes=l15.ONE_RANK))
    l15.check_here(case, None)


# --- L13: moments too ----------------------------------------------------------------

ONE, TWO = (("data", 3),), (("tensor", 2), ("data", 2))
SAVED = {"w": P("data"), "v": P(None, "data"), "s": P()}
RESTORED = {"w": P("tensor", "data"), "v": P("data"), "s": P()}


def trained(tx, dtype):
    """An unsharded state after two steps."""
    params = {
        k: torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, (k, shape) in enumerate({"w": (7, 5), "v": (4, 3), "s": ()}.items())
    }
    step = zf.train_step(
        lambda p, b: sum((b * x.float()).square().sum() for x in tree_leaves(p)), tx
    )
    state = zf.shard(params, zf.make_mesh({}), tx=tx)
    return zf.unshard(step(step(state, torch.tensor(1.0)), torch.tensor(2.0)))


def on_rank(tx, whole, axes, rank, specs):
    """The state as a rank of a mesh holds it."""
    mesh = Mesh(axes, "process", rank=rank)

    def put(tree):
        return {k: place(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()}

    params = put(whole.params)
    moments = tree_map(
        lambda like, x: place(x, like.sharding) if is_sharded(like) else x,
        tx.init(params),
        whole.moments,
        is_leaf=is_sharded,
    )
    return whole.replace(params=params, grads=put(whole.grads), moments=moments)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_l13_moments_restore_on_another_mesh(name, dtype, tmp_path, monkeypatch):
    tx = OPTIMIZERS[name]()
    whole = trained(tx, dtype)
    monkeypatch.setattr(
        states,
        "state_on",
        lambda axes, rank, full, specs: on_rank(tx, full, axes, rank, specs),
    )
    directory = states.saved_by_ranks(tmp_path, ONE, whole, SAVED)
    found, _ = manifest.read_manifest(directory)
    empty = tree_map(torch.zeros_like, whole)
    for rank in range(math.prod(n for _, n in TWO)):
        like = on_rank(tx, empty, TWO, rank, RESTORED)
        got = l13.RESTORE._load(directory, found, like, Mesh(TWO, "process", rank=rank))
        want = on_rank(tx, whole, TWO, rank, RESTORED)
        assert_bitwise(got, want, f"rank {rank}")
