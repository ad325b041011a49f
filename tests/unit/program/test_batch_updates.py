# SPDX-License-Identifier: Apache-2.0
"""``batch_updates``: the optimizer in few launches and in place, to the same bit."""

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.core.common import alone, assert_bitwise, one_rank
from zfunc.core.tree import tree_leaves
from zfunc.optim import GradientTransformation
from zfunc.program import ir
from zfunc.program.batched import Batched
from zfunc.program.chain import Call, Ref, Whole, compiled
from zfunc.program.inplace import written_over
from zfunc.program.jit import jit
from zfunc.program.passes import leaf_calls
from zfunc.program.passes.batch_updates import _is_worth_it, batch_updates

o = zf.optim
SMALL = batch_updates(chunk_numel=13, joined_numel=6)


def normal(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


SHAPES = {
    "bias": (5,),
    "empty": (0, 3),
    "large": (7, 9),
    "one": (1,),
    "scalar": (),
    "tensor": (2, 3, 2),
    "w": (4, 4),
}


def params_of(shapes, dtype=torch.float32):
    return {
        path: normal(shape, i, dtype) for i, (path, shape) in enumerate(shapes.items())
    }


def loss(params, batch):
    """Gradients that differ by element, leaf and step; some are zero."""
    total = 0
    for i, p in enumerate(tree_leaves(params)):
        x = p.float() * (torch.arange(p.numel()) + i).float().cos().view(p.shape)
        total = total + (x.sin() * batch.sum()).sum() + torch.relu(x).square().sum()
    return total


def layer_norms(u, p):
    """LAMB's ratio: a 0-d value per leaf that comes from all of the leaf."""
    ratio = p.square().sum().sqrt() / (u.square().sum().sqrt() + 1e-6)
    return u * ratio


LAMB = o.chain(
    o.scale_by_adam(),
    o.base.stateless("trust", lambda u, p: zf.tree_map(layer_norms, u, p)),
    o.scale_by_learning_rate(0.1),
)
OPTIMIZERS = {
    "sgd": o.sgd(0.1),
    "decayed": o.sgd(0.1, weight_decay=0.1),
    "momentum": o.sgd(0.1, momentum=0.9, dampening=0.5),
    "nesterov": o.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": o.adam(0.1, weight_decay=0.1),
    "no eps": o.adam(0.1, eps=0.0),
    "adamw": o.adamw(o.warmup_cosine(0.1, 2, 10), mask=o.decay_matrices),
    "clip": o.chain(o.clip_by_global_norm(0.5), o.adamw(0.1, mask=o.decay_matrices)),
    "clip value": o.chain(o.clip_by_value(0.01), o.sgd(o.warmup_linear(0.1, 1, 9))),
    "lamb": LAMB,
}


def train(step, state, steps=3):
    for i in range(steps):
        state = step(state, torch.arange(4.0) + i)
    return zf.tree_map(torch.clone, state)


def batched_calls(program):
    return [n for n in program.graph.nodes if isinstance(n.target, Batched)]


def check(tx, params, donate=True, passes=(SMALL,), transforms=(), mesh=alone):
    """Jitted with the pass is eager, bit for bit; returns the program."""
    step = zf.train_step(loss, tx, *transforms)
    jitted = jit(step, donate=donate, passes=passes)
    want = train(step, zf.shard(params, mesh(), tx=tx))
    assert_bitwise(train(jitted, zf.shard(params, mesh(), tx=tx)), want)
    return jitted.lower(zf.shard(params, mesh(), tx=tx), torch.ones(4))


# --- the same bits ------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 5, 64, 2**16])
@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_with_every_optimizer(name, donate, chunk):
    passes = (batch_updates(chunk_numel=chunk, joined_numel=12),)
    program = check(OPTIMIZERS[name], params_of(SHAPES), donate, passes)
    assert batched_calls(program)


@pytest.mark.parametrize("policy", [None, "bf16"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("name", ["clip", "momentum"])
def test_the_same_bits_in_other_precisions(name, dtype, policy):
    transforms = (zf.precision(policy),) if policy else ()
    params = params_of(SHAPES, dtype)
    program = check(OPTIMIZERS[name], params, transforms=transforms)
    assert batched_calls(program)


def test_the_same_bits_with_a_partition_and_microbatches():
    transforms = (zf.partition(zero=3), zf.accumulate(2))
    check(OPTIMIZERS["clip"], params_of(SHAPES), transforms=transforms, mesh=one_rank)


def test_the_same_bits_after_the_default_passes():
    program = check(
        OPTIMIZERS["clip"],
        params_of(SHAPES),
        passes=(*zf.program.passes.DEFAULT, SMALL),
    )
    assert batched_calls(program)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(
        st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=6
    ),
    name=st.sampled_from(sorted(OPTIMIZERS)),
    chunk=st.integers(1, 60),
    joined=st.integers(1, 30),
    donate=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example([(6, 6), (6, 6)], "clip", 7, 1, True, torch.float32)
def test_any_leaves_in_any_chunks(shapes, name, chunk, joined, donate, dtype):
    params = params_of({str(i): shape for i, shape in enumerate(shapes)}, dtype)
    passes = (batch_updates(chunk_numel=chunk, joined_numel=joined),)
    check(OPTIMIZERS[name], params, donate, passes)


@pytest.mark.parametrize("threads", [1, 2])
def test_leaves_that_two_threads_share(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = {"a": (300, 301), "b": (40_000,), "c": (200_003,), "d": (11, 3)}
        program = check(
            OPTIMIZERS["clip"], params_of(shapes), passes=(batch_updates(),)
        )
    finally:
        torch.set_num_threads(before)
    assert len(batched_calls(program)) == 3


# --- leaves whose elements are not in order ------------------------------------


def transposed_loss(params, batch):
    """A gradient with other strides than its parameter's."""
    return ((params["w"].t() * batch[:2, None]).sin() @ params["v"]).sum()


def strides_of(tree):
    return [x.stride() for x in tree_leaves(tree)]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "one of two"])
def test_leaves_in_another_order(layout):
    def fresh():
        state = zf.shard({"v": normal((3, 5)), "w": normal((3, 2), 1)}, alone())

        def turned(x):
            return x.t().contiguous().t()

        if layout == "contiguous":
            return state
        params = zf.tree_map(turned, state.params)
        if layout == "one of two":
            params["v"] = state.params["v"]
        return state.replace(params=params)

    step = zf.train_step(transposed_loss, OPTIMIZERS["clip"])
    want = train(step, fresh())
    for donate in (True, False):
        jitted = jit(step, donate=donate, passes=(SMALL,))
        got = jitted(jitted(fresh(), torch.arange(4.0)), torch.arange(4.0) + 1)
        eager = step(step(fresh(), torch.arange(4.0)), torch.arange(4.0) + 1)
        assert strides_of(got.params) == strides_of(eager.params)
        assert strides_of(got.moments) == strides_of(eager.moments)
        assert_bitwise(train(jitted, fresh()), want)


def test_a_kernel_that_chooses_other_strides_than_were_planned():
    call = one_call(over=False)
    x = normal((4, 6)).t()
    (got,) = call([x])
    assert torch.equal(got, 2 * x)
    assert got.stride() == (4, 1)


def one_call(over):
    """``2 * x`` of one 6 by 4 leaf, planned as contiguous."""
    f32, mul = torch.float32, torch.ops.aten.mul.Tensor
    chain = compiled([Call(mul, (Ref("column", 0), 2.0), f32)], 1, 0, [Whole(0, 0)])
    return Batched(chain, 1, (), ((over,),), ((4, 1),), ((0,),), 5)


# --- in place -----------------------------------------------------------------


def test_gradients_are_divided_where_they_are():
    program = check(OPTIMIZERS["adamw"], {"w": normal((6, 4)), "v": normal((5, 4))})
    inputs = set(ir.inputs_of(program.graph))
    made = [x for x in written_over(program.graph) if x not in inputs]
    assert len(made) == 2


@pytest.mark.parametrize("donate", [True, False])
def test_what_is_written_over(donate):
    params = {"w": normal((6, 4)), "v": normal((5, 4))}
    program = check(OPTIMIZERS["clip"], params, donate=donate)
    written = written_over(program.graph)
    nodes = dict(zip(program.inputs, ir.inputs_of(program.graph), strict=True))
    paths = {path for path, node in nodes.items() if node in written}
    mine = {
        p
        for p in nodes
        if p.split("/")[0] in ("params", "moments") and not p.endswith("count")
    }
    assert paths == (mine if donate else set())
    assert bool(program.donated) == donate


def keeps(make):
    """An optimizer whose moments are what ``make(g, p)`` says."""
    return GradientTransformation(
        lambda params: zf.tree_map(torch.zeros_like, params),
        lambda g, m, p: (
            zf.tree_map(lambda x: -0.1 * x, g),
            zf.tree_map(make, g, p),
        ),
    )


@pytest.mark.parametrize(
    ("name", "make"),
    {
        "the old parameter": lambda g, p: p,
        "a view of the old parameter": lambda g, p: p.view(-1).view(p.shape),
        "the gradient": lambda g, p: g,
        "its negative": lambda g, p: -g,
        "what is made of both": lambda g, p: p.flip(0) + g,
    }.items(),
)
def test_results_that_are_operands(name, make):
    params = {"v": normal((5, 4)), "w": normal((6, 4))}
    for donate in (True, False):
        check(keeps(make), params, donate=donate)


def test_a_gradient_that_is_another_ones_memory():
    """Both gradients are one tensor."""

    def sum_loss(params, batch):
        return ((params["a"] + params["b"]) * batch[:3]).sin().sum()

    step = zf.train_step(sum_loss, OPTIMIZERS["nesterov"])
    params = {"a": normal((4, 3)), "b": normal((4, 3), 1)}
    for donate in (True, False):
        got = train(
            jit(step, donate=donate, passes=(SMALL,)), zf.shard(params, alone())
        )
        assert_bitwise(got, train(step, zf.shard(params, alone())))


def test_a_gradient_that_is_the_batch():
    """What the program is given is not its own."""

    def linear(params, batch):
        return (params["a"] * batch).sum()

    step, batch = zf.train_step(linear, o.sgd(0.1)), normal((40, 3))
    before = batch.clone()
    state = zf.shard({"a": normal((40, 3))}, alone())
    jit(step, passes=(SMALL,))(state, batch)
    assert torch.equal(batch, before)


def test_results_are_tensors_of_their_own():
    """So that the next step may write over them, and saving one saves one."""
    step = zf.train_step(loss, OPTIMIZERS["clip"])
    for donate in (True, False):
        state = zf.shard(params_of(SHAPES), alone())
        state = jit(step, donate=donate, passes=(SMALL,))(state, torch.ones(4))
        leaves = tree_leaves((state.params, state.grads, state.moments))
        storages = {x.untyped_storage()._cdata for x in leaves}
        assert len(storages) == len(leaves)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in leaves)


def test_leaves_of_one_form_that_depend_on_each_other():
    """The same call on a second leaf, of what all of the first leaf's result is."""

    def second_after_first(updates, params):
        first = {"a": updates["a"] * 2.0 * 0.1}
        total = first["a"].sum()
        full = total.exp().expand(updates["b"].shape).clone()
        return first | {"b": full * 2.0 * 0.1}

    def chained(updates, params):
        a = updates["a"] * 2.0 * 0.1
        b = torch.cumsum(a, 0).abs() * 2.0 * 0.1
        return {"a": a, "b": torch.cumsum(b, 0).abs() * 2.0 * 0.1}

    for update in (second_after_first, chained):
        tx = o.chain(o.base.stateless("one after the other", plain(update)), o.sgd(0.1))
        params = {"a": normal((5, 4)), "b": normal((5, 4), 1)}
        program = check(tx, params, passes=(batch_updates(),))
        assert batched_calls(program)


def plain(update):
    """An update of buffers as one of placed leaves."""

    def placed(updates, params):
        buffers = {k: x.buffer for k, x in updates.items()}
        made = update(buffers, params)
        return {k: dataclasses.replace(updates[k], buffer=x) for k, x in made.items()}

    return placed


# --- how many -------------------------------------------------------------------


def test_the_number_of_calls_does_not_grow_with_the_leaves():
    def launches(count):
        params = {f"{i:02}": normal((4, 4), i) for i in range(count)}
        step = zf.train_step(loss, o.adamw(0.1))
        state = zf.shard(params, alone(), tx=o.adamw(0.1))
        program = jit(step, passes=(batch_updates(),)).lower(state, torch.ones(4))
        return [
            n
            for n in ir.calls_of(program.graph)
            if not ir.phase(n) and not ir.is_view(n)
        ]

    few, many = launches(2), launches(12)
    # One sum of squares more per leaf is added to the norm.
    assert len(many) - len(few) == 10


def test_one_small_call_stays_as_it_is():
    params = {"w": normal((2, 2))}
    program = check(o.sgd(0.1), params)
    assert len(batched_calls(program)) == 1
    leaves = list(leaf_calls.leaves_of(program.graph, program))
    assert not any(_is_worth_it([leaf]) for leaf in leaves)
