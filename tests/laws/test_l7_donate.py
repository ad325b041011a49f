# SPDX-License-Identifier: Apache-2.0
"""L7: ``donate(step) == step`` bitwise, what was given is dead; ``step`` is pure.

``jit(step)`` donates too, unless it is told not to: the same law.
"""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws.cases import assert_bitwise, cases, copied, examples
from zfunc.core.sharding import is_sharded
from zfunc.core.tree import leaves_with_path, tree_leaves
from zfunc.testing import simulate

ONE_RANK = st.sampled_from([{}, {"data": 1}])
DEAD = ("params", "grads", "moments")


def steps_here(case):
    """The step for one rank without a simulation, and its state."""
    if case.mesh_shape:
        step, spec = case.recipe.step(), case.recipe.spec
    else:
        step, spec = case.recipe.reference(), None
    mesh = zf.make_mesh(case.mesh_shape)
    return step, zf.shard(case.params, mesh, tx=case.recipe.tx(), spec=spec)


def check(case, donating=zf.donate):
    """Every step of a donating run is bitwise that of the pure run."""
    step, pure = steps_here(case)
    donated, program = copied(pure), donating(step)
    for batch in case.batches:
        pure = step(pure, batch)
        donated = program(donated, batch)
        assert_bitwise(donated, pure, "donated")


def check_clipped_twice(case):
    """Memory of the program's own may be needed later on: by results, by messages."""
    step, state = steps_here(case)
    clips = [zf.optim.clip_by_global_norm(norm) for norm in (0.5, 0.1)]
    step = step._replace(tx=zf.optim.chain(*clips, step.tx))
    want, got = state.replace(moments=None), copied(state.replace(moments=None))
    program = zf.jit(step)
    for batch in case.batches:
        want, got = step(want, batch), program(got, batch)
        assert_bitwise(got, want, "donated to a program of several norms")


def check_shared(case, donating=zf.donate):
    """Nothing is written over: tensors that share its memory keep their values."""
    step, state = steps_here(case)
    state, program = step(state, case.batches[0]), donating(step)
    for batch in case.batches[1:]:
        kept = copied(state)
        shared = (zf.tree_map(lambda x: x, state), zf.unshard(state), views(state))
        want, state = step(copied(state), batch), program(state, batch)
        for tree in shared[:2]:
            assert_bitwise(zf.unshard(tree), zf.unshard(kept), "a tree taken before")
        assert_bitwise(shared[2], views(kept), "views taken before")
        assert_bitwise(state, want, "donated, while others look at it")


def views(state):
    """Other tensors over the memory of the state."""
    return [x.view(-1)[: x.numel() // 2] for x in tree_leaves(state)]


def check_simulated(case):
    """The same on several ranks, whose buffers are the rows of the caller's tensors."""
    donating = simulate(zf.donate(case.recipe.step()), case.mesh_shape)
    given_away = functools.reduce(donating, case.split(), copied(case.shard()))
    assert_bitwise(given_away, case.train(), "donated")


def check_dead(case, donating=zf.donate):
    """The state that was given refuses every use, by the path of the leaf."""
    step, state = steps_here(case)
    state = step(state, case.batches[0])
    donating(step)(state, case.batches[0])
    for field in DEAD:
        for path, leaf in leaves_with_path(getattr(state, field), is_sharded):
            if is_sharded(leaf):
                refuses(f"state.{field}[{path!r}]", leaf.buffer)
    for program in (step, zf.donate(step), zf.jit(step), zf.jit(step, donate=False)):
        with pytest.raises(zf.DonatedBufferError, match="was donated to a step"):
            program(state, case.batches[0])
    readable = (state.step, state.key, state.metrics)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(readable))


def refuses(name, buffer):
    uses = (torch.clone, lambda x: x.shape, lambda x: torch.ones(()) + x)
    for use in uses:
        with pytest.raises(zf.DonatedBufferError) as caught:
            use(buffer)
        assert str(caught.value).startswith(f"{name} was donated")


def check_pure(case):
    """An undonated step changes nothing that it is given, nor does it write to it."""
    state, batch = case.shard(), case.split()[0]
    state = case.train(state=state, batches=[batch])
    leaves = tree_leaves((state, batch))
    versions = [leaf._version for leaf in leaves]
    before = copied((state, batch))
    after = case.train(state=state, batches=[batch])
    assert_bitwise((state, batch), before, "the arguments of a pure step")
    assert [leaf._version for leaf in leaves] == versions
    old = {leaf.untyped_storage().data_ptr() for leaf in leaves if leaf.numel()}
    new = tree_leaves((after.params, after.grads, after.moments))
    assert not any(x.untyped_storage().data_ptr() in old for x in new if x.numel())


def check_untouched(case):
    """Nor does a program that is told not to donate."""
    step, state = steps_here(case)
    before, batch = copied((state, case.batches[0])), case.batches[0]
    versions = [leaf._version for leaf in tree_leaves((state, batch))]
    zf.jit(step, donate=False)(state, batch)
    assert_bitwise((state, batch), before, "the arguments of a pure program")
    assert [x._version for x in tree_leaves((state, batch))] == versions


@examples(0.5)
@given(cases(mesh_shapes=ONE_RANK, num_steps=3))
def test_donating_changes_no_bit(case):
    check(case)


@examples(0.5)
@given(cases())
def test_donating_changes_no_bit_on_several_ranks(case):
    check_simulated(case)


@examples(0.3)
@given(cases(mesh_shapes=ONE_RANK))
def test_donating_writes_nothing_over(case):
    check_shared(case)


@examples(0.3)
@given(cases(mesh_shapes=ONE_RANK, num_steps=1))
def test_what_was_donated_is_dead(case):
    check_dead(case)


@examples(0.15)
@given(cases(mesh_shapes=ONE_RANK, num_steps=3))
def test_donating_to_a_program_changes_no_bit(case):
    check(case, zf.jit)


@examples(0.1)
@given(cases(mesh_shapes=ONE_RANK, num_steps=2))
def test_programs_of_several_norms(case):
    check_clipped_twice(case)


@examples(0.15)
@given(cases(mesh_shapes=ONE_RANK, num_steps=3))
def test_a_program_writes_nothing_over_that_others_see(case):
    check_shared(case, zf.jit)


@examples(0.1)
@given(cases(mesh_shapes=ONE_RANK, num_steps=1))
def test_what_was_donated_to_a_program_is_dead(case):
    check_dead(case, zf.jit)


@examples(0.1)
@given(cases(mesh_shapes=ONE_RANK, num_steps=1))
def test_a_program_that_does_not_donate_changes_nothing(case):
    check_untouched(case)


@examples(0.5)
@given(cases(num_steps=1))
def test_a_step_changes_nothing_it_is_given(case):
    check_pure(case)


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: -x,
        lambda x: x[0],
        lambda x: x == 1,
        lambda x: float(x),
        len,
        list,
    ],
)
@pytest.mark.parametrize("donating", [zf.donate, zf.jit])
def test_the_operators_of_a_dead_leaf_name_it(use, donating):
    state = zf.shard({"w": torch.ones(2)}, zf.make_mesh({}))
    donating(zf.train_step(lambda p, b: p["w"].sum(), zf.optim.sgd(0.1)))(state, ())
    with pytest.raises(zf.DonatedBufferError, match=r"state.params\['w'\] was donated"):
        use(state.params["w"].buffer)
