# SPDX-License-Identifier: Apache-2.0
"""L15: ``jit(step) == step`` bitwise, after any passes, and no order can deadlock."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import zfunc as zf
from tests.laws.cases import assert_bitwise, cases, examples
from zfunc.program import inplace, ir, passes
from zfunc.program.passes.chains import is_layout, made_by, read_from
from zfunc.program.passes.keep_gathered import keep_gathered
from zfunc.testing import Recipe, lockstep, random_batch, random_tree, simulate

ONE_RANK = st.sampled_from([{}, {"data": 1}])
POLICIES = st.sampled_from((None, None, "bf16", "compute=bf16,output=bf16"))
RANKS = st.one_of(
    st.integers(2, 5).map(lambda n: {"data": n}),
    st.sampled_from(
        ({"data": 2, "tensor": 2}, {"tensor": 2, "data": 2}, {"data": 3, "tensor": 1})
    ),
)
ORDERS = st.randoms(use_true_random=False)
BACKENDS = ("aten", "inductor")


def step_of(case, policy):
    """The recipe's step, in some precision; without a partition on a mesh of none."""
    step = case.recipe.step() if case.mesh_shape else case.recipe.reference()
    return step if policy is None else zf.precision(policy)(step)


# --- one process -----------------------------------------------------------------


def check_here(case, policy):
    """Every step of a jitted run on one rank is that of the eager run."""
    step = step_of(case, policy)
    spec = case.recipe.spec if case.mesh_shape else None
    mesh = zf.make_mesh(case.mesh_shape)
    want = zf.shard(case.params, mesh, tx=case.recipe.tx(), spec=spec)
    jitted, got = zf.jit(step, donate=False), want
    for batch in case.batches:
        want, got = step(want, batch), jitted(got, batch)
        assert_bitwise(got, want, "jitted")


@examples(0.25)
@given(cases(mesh_shapes=ONE_RANK, num_steps=3), POLICIES)
def test_jitted_is_eager(case, policy):
    check_here(case, policy)


def test_moments_are_made_by_the_first_step():
    step = zf.train_step(lambda p, b: (p["w"] * b).square().mean(), zf.optim.adamw(0.1))
    state = zf.shard({"w": torch.ones(3)}, zf.make_mesh({}))
    assert_bitwise(
        zf.jit(step, donate=False)(state, torch.ones(3)),
        step(state, torch.ones(3)),
        "without moments",
    )


# --- several ranks ---------------------------------------------------------------


def names_of(chosen):
    return ", ".join(p.__name__ for p in chosen) or "no pass"


class Traced:
    """A case's programs before any pass, and what they have to compute."""

    def __init__(self, case, policy=None):
        step = step_of(case, policy)
        self.start, self.batches = case.shard(), case.split()
        self.lock = lockstep(step, case.mesh_shape)
        self.programs = self.lock.lower(self.start, self.batches[0])
        if policy is None:
            sim = simulate(step, case.mesh_shape)
            self.want = functools.reduce(sim, self.batches, self.start)
        else:
            # The batched kernels of vmap round bfloat16 otherwise; that what is traced
            # is the eager step there is for one rank, and for real ranks, to show.
            self.want = self.after(())

    def after(self, chosen):
        """The state after the batches, by programs that passes have changed."""
        programs = [
            inplace.write_over(functools.reduce(lambda p, f: f(p), chosen, program))
            for program in self.programs
        ]
        state = self.start
        for batch in self.batches:
            state = self.lock(state, batch, programs)
        return state

    def check(self, chosen):
        assert_bitwise(self.after(chosen), self.want, names_of(chosen))


def check(case, policy=None):
    """What is traced computes the step, before any pass and after the default ones."""
    traced = Traced(case, policy)
    traced.check(())
    traced.check(passes.DEFAULT)


def keeping(limit_bytes):
    """Gather again, and take some of it back."""
    keep = keep_gathered(memory_limit_bytes=limit_bytes)
    return (passes.sink, passes.regather, keep)


def batched(chunk_numel, joined_numel):
    """The pass with chunks so small, or so large, that leaves are cut, or joined."""
    return passes.batch_updates(chunk_numel=chunk_numel, joined_numel=joined_numel)


def check_each(case):
    """Each pass alone changes no bit."""
    traced = Traced(case)
    for one in passes.ALL:
        traced.check((one,))
    for limit_bytes in (0, 4000, 2**40):
        traced.check(keeping(limit_bytes))
    for numels in ((1, 1), (4, 2), (2**16, 2**16)):
        traced.check((passes.simplify, batched(*numels)))


def check_some(case, order):
    """Nor do some passes, each at most once, in any legal order."""
    traced = Traced(case)
    for _ in range(3):
        some = order.sample(passes.ALL, order.randint(2, len(passes.ALL)))
        traced.check(legal(some))


def legal(chosen):
    """What merges messages comes before what moves a message and its wait apart."""
    places = [
        i for i, p in enumerate(chosen) if p.__name__ in ("bucketed", "prefetched")
    ]
    pair = sorted((chosen[i] for i in places), key=lambda p: p.__name__)
    made = list(chosen)
    for i, one in zip(places, pair, strict=True):
        made[i] = one
    return made


@examples(0.1)
@given(cases(mesh_shapes=RANKS), POLICIES)
def test_lockstep_is_simulated(case, policy):
    check(case, policy)


@examples(0.08)
@given(cases(mesh_shapes=RANKS, num_steps=1))
def test_each_pass_alone(case):
    check_each(case)


@examples(0.08)
@given(cases(mesh_shapes=RANKS, num_steps=1), ORDERS)
def test_some_passes_in_some_order(case, order):
    check_some(case, order)


# --- what the passes are for ---------------------------------------------------------


def program_of(case, chosen):
    """Rank 0's program, from shapes alone."""
    recipe, mesh = case.recipe, zf.AbstractMesh(case.mesh_shape)
    params = zf.abstract(case.params)
    state = zf.shard(params, mesh, tx=recipe.tx(), spec=recipe.spec)
    ours = zf.tree_map(lambda x: x[0], case.split()[0])
    return zf.jit(recipe.step(), passes=chosen).lower(state, ours)


def without(name):
    return [p for p in passes.DEFAULT if p.__name__ != name]


def check_regathered(case):
    """At stage 3 nothing that the forward gathers is alive in the backward."""
    program = program_of(case, without("keep_small"))
    for graph in ir.with_bodies(program.graph):
        for start in ir.calls_of(graph):
            if start.target is not ir.ALL_GATHER or ir.phase(start) != "forward":
                continue
            whole = read_from(start)
            users = {user for node in whole for user in node.users} - set(whole)
            late = [user for user in users if ir.phase(user) == "backward"]
            assert not late, f"{start} of the forward is used by {late}"


def check_early(case):
    """A gradient is reduced as soon as it exists, if it need not wait for a bucket."""
    program = program_of(case, without("bucketed"))
    for graph in ir.with_bodies(program.graph):
        where = {node: i for i, node in enumerate(graph.nodes)}
        starts = [n for n in ir.calls_of(graph) if n.target is ir.REDUCE_SCATTER]
        for start in starts:
            made = [*made_by(start), start]
            ready = max(where[n] for node in made for n in node.all_input_nodes)
            between = [n for n in ir.calls_of(graph) if ready < where[n] < where[start]]
            free = [n for n in between if is_layout(n) or n.target is ir.WAIT]
            late = [n for n in between if n not in made and n not in free]
            assert not late, f"{start} waits while {late} are computed"


@examples(0.15)
@given(cases(zero=3, mesh_shapes=RANKS, num_steps=1))
def test_nothing_stays_gathered_for_the_backward(case):
    check_regathered(case)


@examples(0.15)
@given(cases(mesh_shapes=RANKS, num_steps=1))
def test_gradients_are_reduced_early(case):
    check_early(case)


# --- the size of programs --------------------------------------------------------


def num_nodes(graph):
    return sum(len(one.nodes) for one in ir.with_bodies(graph))


def check_size(zero):
    """Eight microbatches make a program that is hardly larger than one's."""
    mesh, chosen = zf.AbstractMesh({"data": 2}), [(), passes.DEFAULT]
    params = zf.abstract(random_tree([torch.Size([7, 3])] * 4, seed=0))
    batch = zf.abstract(random_batch(8, seed=0))
    sizes = []
    for n in (1, 8):
        recipe = Recipe(zero=zero, optimizer="adamw", clip=1.0, num_microbatches=n)
        state = zf.shard(params, mesh, tx=recipe.tx(), spec=recipe.spec)
        programs = [
            zf.jit(recipe.step(), passes=some).lower(state, batch) for some in chosen
        ]
        sizes.append([num_nodes(program.graph) for program in programs])
    for one, eight in zip(*sizes, strict=True):
        assert eight <= 1.2 * one, sizes


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_programs_do_not_grow_with_the_microbatches(zero):
    check_size(zero)


# --- a backward that is wrong on purpose -----------------------------------------


class Hundredfold(torch.autograd.Function):
    """The identity, whose backward says otherwise: what autograd cannot derive."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 100 * g


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_backwards_are_honoured(backend, remat, microbatches):
    def block(w):
        return Hundredfold.apply(w)

    inner = zf.remat(block) if remat else block
    step = zf.train_step(
        lambda p, b: (inner(p["w"]) * b).mean(0).sum(),
        zf.optim.sgd(0.1),
        zf.accumulate(microbatches),
    )
    state = zf.shard({"w": torch.ones(3)}, zf.make_mesh({}))
    got = zf.jit(step, donate=False, backend=backend)(state, torch.ones(2, 3))
    assert got.grads["w"].buffer.tolist() == [100.0] * 3
