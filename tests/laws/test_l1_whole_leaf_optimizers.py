# SPDX-License-Identifier: Apache-2.0
"""L1, L2, L3, L7, L11, L15 of the optimizers that look at whole leaves.

LAMB takes norms, Muon orthogonalizes, Adafactor takes means of rows and columns: none
of that may see that a leaf is in pieces, or where its padding is.
"""

import dataclasses
from types import MappingProxyType
from typing import Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws import test_l1_commuting_square as l1
from tests.laws import test_l2_placement as l2
from tests.laws import test_l3_stages as l3
from tests.laws import test_l7_donate as l7
from tests.laws import test_l11_moments as l11
from tests.laws import test_l15_jit as l15
from tests.laws.cases import assert_bitwise, cases, examples
from zfunc.core import collectives
from zfunc.core.sharding import place, replicate
from zfunc.testing import (
    Recipe,
    assert_equivalent,
    differences,
    random_batch,
    random_tree,
    spmd,
)

MAKERS: Final = MappingProxyType(
    {
        "lamb": lambda: zf.optim.lamb(0.01, weight_decay=0.1),
        "lamb_raw": lambda: zf.optim.lamb(0.01, bias_correction=False, max_coeff=2.0),
        "muon": lambda: zf.optim.muon(0.02, weight_decay=0.1, adam_learning_rate=0.01),
        "muon_rms": lambda: zf.optim.muon(
            0.02,
            nesterov=False,
            scale="match_rms_adamw",
            num_steps=2,
            mask=zf.optim.decay_matrices,  # stacks of matrices too
        ),
        "adafactor": lambda: zf.optim.adafactor(0.1),
        "adafactor_momentum": lambda: zf.optim.adafactor(0.1, 0.9, weight_decay=0.1),
    }
)
KINDS = st.sampled_from(list(MAKERS))


@dataclasses.dataclass(frozen=True)
class WholeLeaf(Recipe):
    """A recipe with one of these optimizers."""

    kind: str = "lamb"

    def tx(self):
        made = MAKERS[self.kind]()
        if self.clip is None:
            return made
        return zf.optim.chain(zf.optim.clip_by_global_norm(self.clip), made)


@st.composite
def whole_cases(draw, /, kinds=KINDS, **fixed):
    """Cases whose recipe is a ``WholeLeaf``."""
    case = draw(cases(optimizer="sgd", **fixed))
    recipe = WholeLeaf(**vars(case.recipe), kind=draw(kinds))
    return case._replace(recipe=recipe)


def of(*kinds, **fixed):
    return whole_cases(st.sampled_from(kinds), **fixed)


# --- L1 --------------------------------------------------------------------------


@examples(1)
@given(whole_cases())
def test_sharded_training_is_unsharded_training(case):
    l1.check(case)


@examples(0.3)
@given(whole_cases(zero=st.integers(1, 3)), st.data())
def test_whatever_dim_of_each_leaf_is_sharded(case, data):
    def layout(leaf):
        dim = data.draw(st.integers(-1, leaf.dim() - 1))
        return zf.P() if dim < 0 else zf.P(*[None] * dim, "data")

    spec = zf.tree_map(layout, case.params)
    args = (case.params, case.batches, case.recipe, case.mesh_shape)
    assert_equivalent(None, *args, spec=spec)


GRID = {"data": 2, "tensor": 3}
SHAPES = {
    "both": (5, 4),
    "crossed": (5, 4),
    "stack": (3, 4, 7),
    "twin": (5, 4),
    "v": (5,),
    "w": (6, 1),
    "whole": (5, 4),
}
SPECS = {
    "both": zf.P("data", "tensor"),
    "crossed": zf.P("tensor", "data"),
    "stack": zf.P("tensor", None, "data"),
    "twin": zf.P("data", "tensor"),
    "v": zf.P("tensor"),
    "w": zf.P(None, "data"),
    "whole": zf.P(),
}


def updates_of(tx, trees):
    """The updates of three steps, and the last moments."""
    moments, made = tx.init(trees[0]), []
    for grads in trees[1:]:
        updates, moments = tx.update(grads, moments, trees[0])
        made.append(updates)
    return made, moments


@pytest.mark.parametrize("kind", MAKERS)
def test_leaves_sharded_over_two_axes(kind):
    sizes = {k: torch.Size(shape) for k, shape in SHAPES.items()}
    trees = [random_tree(sizes, seed) for seed in range(4)]
    tx = MAKERS[kind]()

    def program(mesh, stacked):
        placed = [
            {k: place(x, zf.NamedSharding(mesh, SPECS[k])) for k, x in tree.items()}
            for tree in stacked
        ]
        made, moments = updates_of(tx, placed)
        return replicate(made), replicate(moments), moments

    stacked = zf.tree_map(lambda x: x.expand(6, *x.shape), trees)
    *got, placed = spmd(program, GRID)(stacked)
    want = updates_of(tx, trees)
    for rank in range(6):
        mine = zf.tree_map(lambda x, r=rank: x[r], tuple(got))
        assert not differences(mine, want, rtol=1e-9, atol=1e-12)
    l2.check_buffers(placed)


@pytest.mark.parametrize(
    ("kind", "sums", "exchanges"), [("lamb", 1, 0), ("adafactor", 2, 0), ("muon", 0, 4)]
)
@pytest.mark.parametrize("copies", [1, 3])
def test_messages_do_not_grow_with_the_leaves(
    monkeypatch, kind, sums, exchanges, copies
):
    calls = []

    def counted(name):
        collective = getattr(collectives, name)

        def one(*args, **options):
            calls.append(name)
            return collective(*args, **options)

        monkeypatch.setattr(collectives, name, one)

    for name in ("psum", "all_to_all", "all_gather"):
        counted(name)
    shapes = {"w": (5, 3), "other": (3, 4), "b": (5,), "s": ()}
    sizes = [{k: torch.Size(s) for k, s in shapes.items()}] * copies
    params, tx = random_tree(sizes, 0), MAKERS[kind]()
    assert not tx.leafwise  # or a donated step would send them group by group

    def program(mesh, stacked):
        placed = zf.shard(stacked, mesh).params
        return tx.update(placed, tx.init(placed), placed)[0]

    stacked = zf.tree_map(lambda x: x.expand(2, *x.shape), params)
    spmd(program, {"data": 2})(stacked)
    assert sorted(calls) == ["all_to_all"] * exchanges + ["psum"] * sums


@pytest.mark.parametrize("kind", MAKERS)
def test_a_state_of_plain_tensors(kind):
    recipe = WholeLeaf(kind=kind)
    step, params = recipe.reference(), random_tree([torch.Size([3, 2])] * 2, 0)
    batch = random_batch(2, 0)
    state = step(zf.shard(params, zf.make_mesh({}), tx=recipe.tx()), batch)
    want = zf.unshard(step(state, batch)).params
    assert_bitwise(step(zf.unshard(state), batch).params, want, "plain")


# --- L2, L11 ---------------------------------------------------------------------


@examples(0.3)
@given(whole_cases())
def test_a_step_keeps_placement(case):
    l2.check(case)


@examples(0.4)
@given(whole_cases(num_steps=1), st.sampled_from([torch.float64, torch.bfloat16]))
def test_moments_of_pieces_are_pieces_of_moments(case, dtype):
    params = zf.tree_map(lambda x: x.to(dtype), case.params)
    l11.check(case._replace(params=params), case.recipe.tx())


# --- L3 --------------------------------------------------------------------------


@examples(0.1)
@given(whole_cases(zero=3, num_microbatches=1))
def test_the_stages_agree_bitwise(case):
    l3.check_one_microbatch(case)


# --- L15 -------------------------------------------------------------------------


@examples(0.06)
@given(whole_cases(mesh_shapes=l15.ONE_RANK), l15.POLICIES)
def test_jitted_is_eager(case, policy):
    l15.check_here(case, policy)


@pytest.mark.parametrize("kind", ["lamb", "muon", "adafactor_momentum"])
def test_the_programs_of_all_ranks_are_the_step(kind):
    @examples(0.02)
    @given(of(kind, mesh_shapes=l15.RANKS, num_steps=1))
    def programs(case):
        l15.check(case)

    programs()


# --- L7 --------------------------------------------------------------------------


@examples(0.2)
@given(whole_cases(num_steps=2))
def test_donation_changes_no_bit(case):
    l7.check_simulated(case)
