# SPDX-License-Identifier: Apache-2.0
"""Wrong uses and what they are answered: the whole message, as a user reads it.

A message says what is wrong, where, what was found, and what to type instead. ``...``
stands for anything.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import zfunc as zf
from zfunc.testing import simulate, split_batch, spmd

W = torch.ones(6, 2)
BATCH = {"x": torch.ones(6, 3), "y": torch.ones(6)}


class Wrong(NamedTuple):
    """A wrong use, the error class and the message."""

    use: Callable[[], Any]
    error: type[Exception]
    message: str


def alone():
    return zf.make_mesh({})


def one_rank():
    return zf.make_mesh({"data": 1})


def summed(params, batch):
    return params["w"].sum()


def params_of():
    return {"w": W.clone()}


def make(loss_fn=summed, *transforms, tx=None):
    return zf.train_step(loss_fn, tx or zf.optim.sgd(0.1), *transforms)


def run(loss_fn=summed, *transforms, mesh=alone, batch=None, tx=None, **options):
    state = zf.shard(params_of(), mesh(), **options)
    return make(loss_fn, *transforms, tx=tx)(state, batch)


def returning(value):
    return run(lambda p, b: value(p["w"].sum()))


def simulated(step, shape, **options):
    sim = simulate(step, shape)
    return sim(sim.shard(params_of(), **options), split_batch(BATCH, shape))


def donated_twice():
    step = zf.donate(make())
    state = zf.shard(params_of(), alone())
    step(state, None)
    return step(state, None)


def moments_of_another_optimizer():
    state = zf.shard(params_of(), alone(), tx=zf.optim.sgd(0.1))
    return make(tx=zf.optim.adam(0.1))(state, None)


def moments_of_another_placement():
    tx = zf.optim.adam(0.1)
    state = zf.shard(params_of(), one_rank(), tx=tx)
    whole = zf.shard(params_of(), one_rank(), tx=tx, spec=zf.P())
    step = make(summed, zf.partition(zero=1), tx=tx)
    return step(state.replace(moments=whole.moments), None)


def moved_to_another_mesh():
    placed = zf.shard(params_of(), one_rank()).params
    return zf.reshard(placed, zf.NamedSharding(alone(), zf.P()))


def plain_state(*transforms):
    state = zf.unshard(zf.shard(params_of(), one_rank()))
    return make(summed, *transforms)(state, None)


MESH = {
    "a mesh of another size": Wrong(
        lambda: zf.make_mesh({"data": 2}),
        zf.MeshError,
        "the mesh {'data': 2} has 2 ranks but this job has 1: start it with `torchrun "
        "--nproc-per-node 2 ...` or make the product of the axis sizes 1. "
        "(zfunc.testing.simulate runs all the ranks of a mesh in one process.)",
    ),
    "an axis of size 0": Wrong(
        lambda: zf.make_mesh({"data": 0}),
        zf.MeshError,
        "axis 'data' has size 0; it must be an int >= 1",
    ),
    "axes without names": Wrong(
        lambda: zf.make_mesh([2]),
        zf.MeshError,
        'a mesh is made from axis sizes by name, as {"data": 2}; got [2]',
    ),
    "a name with a space": Wrong(
        lambda: zf.make_mesh({"da ta": 1}),
        zf.MeshError,
        "an axis name is an identifier such as 'data'; ...'da ta'",
    ),
    "an unknown axis": Wrong(
        lambda: zf.psum(W, "dat", one_rank()),
        zf.MeshError,
        "axis 'dat' is not an axis of the mesh {'data': 1}; its axes: 'data'",
    ),
    "an axis of a mesh without axes": Wrong(
        lambda: zf.psum(W, "data", alone()),
        zf.MeshError,
        "axis 'data' is not an axis of the mesh {}; its axes: none",
    ),
    "a collective without ranks": Wrong(
        lambda: zf.psum(W, "data", zf.AbstractMesh({"data": 2})),
        zf.MeshError,
        "the mesh {'data': 2} is abstract: it has no ranks to talk to. Give it fake "
        "tensors (zf.abstract(tree)), or use zf.make_mesh inside a job.",
    ),
    "a dim that does not divide": Wrong(
        lambda: zf.psum_scatter(torch.ones(3), "data", zf.AbstractMesh({"data": 2})),
        zf.MeshError,
        "psum_scatter over 'data' splits a dim into 2 equal chunks, but dim 0 has size "
        "3: pad it, or use a size that divides.",
    ),
    "a rank that is sent to twice": Wrong(
        lambda: zf.ppermute(W, "data", zf.AbstractMesh({"data": 2}), [(0, 1), (1, 1)]),
        zf.MeshError,
        "ppermute over 'data': a rank appears twice in ((0, 1), (1, 1))",
    ),
    "a rank that is not there": Wrong(
        lambda: zf.ppermute(W, "data", zf.AbstractMesh({"data": 2}), [(0, 2)]),
        zf.MeshError,
        "ppermute over 'data': ranks are 0..1; got ((0, 2),)",
    ),
}

PLACEMENT = {
    "two axes on one dim": Wrong(
        lambda: zf.P(("data", "tensor")),
        zf.PlacementError,
        "P takes one axis name or None per dim: P('data', None); got ('data', "
        "'tensor'). Several axes on one dim are not supported.",
    ),
    "one axis on two dims": Wrong(
        lambda: zf.P("data", "data"),
        zf.PlacementError,
        "P('data', 'data'): an axis can shard one dim only",
    ),
    "memory that is not there": Wrong(
        lambda: zf.NamedSharding(one_rank(), zf.P(), "pinned_host"),
        zf.PlacementError,
        "memory_kind 'pinned_host' is not supported: use 'device'.",
    ),
    "a spec of more dims": Wrong(
        lambda: zf.shard({"b": W[0]}, one_rank(), spec={"b": zf.P(None, "data")}),
        zf.PlacementError,
        "P(None, 'data') has 2 entries but the tensor has shape (2,): give at most one "
        "entry per dim, or P().",
    ),
    "a spec that is a string": Wrong(
        lambda: zf.shard(params_of(), one_rank(), spec="data"),
        zf.PlacementError,
        "spec['w'] is 'data': give a P, such as P('data') or P().",
    ),
    "a spec for other parameters": Wrong(
        lambda: zf.shard(params_of(), one_rank(), spec={"v": zf.P()}),
        zf.StructureError,
        "not a prefix of the tree: ...\n"
        "Give one value for the whole tree, or a tree of the same keys.",
    ),
    "a spec for parameters that are placed already": Wrong(
        lambda: zf.shard(
            zf.shard(params_of(), one_rank()).params, one_rank(), spec=zf.P()
        ),
        zf.PlacementError,
        "params are placed already: give spec= to what placed them (from_hf).",
    ),
    "parameters that are placed on another mesh": Wrong(
        lambda: zf.shard(
            {"w": zf.shard(torch.ones(2), one_rank()).params}, zf.make_mesh({})
        ),
        zf.PlacementError,
        "params['w'] is placed on the mesh {'data': 1}, not on {}: move it with "
        "zf.reshard.",
    ),
    "a move to another mesh": Wrong(
        moved_to_another_mesh,
        zf.PlacementError,
        "w: cannot move from mesh {'data': 1} to {} inside a program: save a "
        "checkpoint and load it on the other mesh.",
    ),
    "an integer leaf": Wrong(
        lambda: zf.shard({"layers": [torch.arange(3)]}, alone()),
        TypeError,
        "params['layers/0'] is torch.int64 and cannot be differentiated: keep integer "
        "and complex leaves out of params: close over them in the loss.",
    ),
    "a module": Wrong(
        lambda: zf.shard(torch.nn.Linear(2, 2), alone()),
        TypeError,
        "params has a module, Linear: give its tensors, "
        "dict(module.named_parameters()), and call it in the loss through "
        "torch.func.functional_call(module, params, args).",
    ),
    "a leaf that is no tensor": Wrong(
        lambda: zf.shard({"rate": 0.1}, alone()),
        TypeError,
        "params['rate'] is a float, not a tensor: wrap it with torch.as_tensor(...), "
        "or close over it in the loss.",
    ),
    "an integer storage dtype": Wrong(
        lambda: zf.shard(params_of(), alone(), dtype=torch.int8),
        TypeError,
        "the storage dtype is a floating torch.dtype such as torch.bfloat16, got "
        "torch.int8",
    ),
    "no parameters": Wrong(
        lambda: zf.shard({}, alone()),
        TypeError,
        "params has no leaves: there is nothing to train.",
    ),
}

STRUCTURE = {
    "trees of different keys": Wrong(
        lambda: zf.tree_map(torch.add, {"w": W}, {"v": W}),
        zf.StructureError,
        "tree does not have the structure that is needed here:\n"
        "  missing: w\n"
        "  not expected: v\n"
        "give trees of one structure.",
    ),
    "the moments of another optimizer": Wrong(
        moments_of_another_optimizer,
        zf.StructureError,
        "state.moments does not have the structure that is needed here:\n"
        "  missing: 1/count\n"
        "  missing: 1/mu/w\n"
        "  missing: 1/nu/w\n"
        "They belong to another optimizer or other parameters: make the state with "
        "zf.shard(params, mesh, tx=tx), or start this optimizer afresh with "
        "state.replace(moments=None).",
    ),
    "moments of another placement": Wrong(
        moments_of_another_placement,
        zf.StructureError,
        "state.moments does not have the structure that is needed here:\n"
        "  1/mu/w: expected ...spec=P('data')..., got ...spec=P()...\n"
        "  1/nu/w: expected ...spec=P('data')..., got ...spec=P()...\n"
        "They belong to another optimizer or other parameters: ...",
    ),
}

LOSS = {
    "a vector": Wrong(
        lambda: returning(lambda s: s.expand(3)),
        zf.LossError,
        "the loss must be a 0-d tensor or Mean(total, weight), got shape (3,): reduce "
        "it, with .mean() or .sum().",
    ),
    "a python number": Wrong(
        lambda: returning(lambda s: 1.0),
        zf.LossError,
        "the loss must be a 0-d tensor or Mean(total, weight), got a float: reduce it, "
        "with .mean() or .sum().",
    ),
    "nothing": Wrong(
        lambda: returning(lambda s: None),
        zf.LossError,
        "the loss must be a 0-d tensor or Mean(total, weight), got a NoneType: reduce "
        "it, with .mean() or .sum().",
    ),
    "three values": Wrong(
        lambda: returning(lambda s: (s, {}, {})),
        zf.LossError,
        "the loss must be a 0-d tensor or Mean(total, weight), got a tuple: reduce it, "
        "with .mean() or .sum().",
    ),
    "an integer": Wrong(
        lambda: returning(lambda s: s.long()),
        zf.LossError,
        "the loss must be floating, got torch.int64",
    ),
    "aux that is no scalar": Wrong(
        lambda: returning(lambda s: (s, {"seen": [s.expand(2)]})),
        zf.LossError,
        "aux['seen/0'] has shape (2,): metrics are scalars. Reduce it (.mean()), or "
        "return Mean(total, weight).",
    ),
    "aux that is text": Wrong(
        lambda: returning(lambda s: (s, {"name": "run"})),
        zf.LossError,
        "aux['name'] must be a 0-d tensor or Mean(total, weight), got a str: reduce "
        "it, with .mean() or .sum().",
    ),
    "a weight that depends on the parameters": Wrong(
        lambda: returning(lambda s: zf.Mean(s, s)),
        zf.LossError,
        "the loss: the weight of a Mean depends on the parameters, and its gradient "
        "would be dropped: make it from the batch alone..., or detach "
        "it.",
    ),
    "such a weight in aux": Wrong(
        lambda: returning(lambda s: (s, {"a": zf.Mean(s, s)})),
        zf.LossError,
        "aux['a']: the weight of a Mean depends on the parameters, and its gradient "
        "would be dropped: make it from the batch alone..., or detach "
        "it.",
    ),
    "a weight that is no scalar": Wrong(
        lambda: returning(lambda s: zf.Mean(s, torch.ones(2))),
        zf.LossError,
        "the loss: the weight of a Mean is 0-d, got torch.Size([2])",
    ),
    "a function of value_and_grad that is no scalar": Wrong(
        lambda: zf.value_and_grad(lambda w: 2 * w)(W),
        zf.LossError,
        "the function must return a floating 0-d tensor; it returned a tensor of shape "
        "(6, 2), torch.float32. Reduce it, with .mean() or .sum().",
    ),
    "nothing to differentiate": Wrong(
        lambda: zf.value_and_grad(lambda p: W.sum())({}),
        TypeError,
        "params has no leaves: there is nothing to differentiate.",
    ),
}

STEP = {
    "a loss that is no function": Wrong(
        lambda: zf.train_step(3, zf.optim.sgd(0.1)),
        TypeError,
        "loss_fn must be a function, got a...int",
    ),
    "an optimizer that is none": Wrong(
        lambda: zf.train_step(summed, 3),
        TypeError,
        "tx must be a GradientTransformation such as zf.optim.adamw(3e-4), got 3. "
        "(Transformations such as partition come after it.)",
    ),
    "a transformation in its place": Wrong(
        lambda: zf.train_step(summed, zf.partition(zero=1)),
        TypeError,
        "tx must be a GradientTransformation such as zf.optim.adamw(3e-4), got "
        "<function partition(zero=1) at 0x...>. (Transformations such as partition "
        "come after it.)",
    ),
    "an optimizer of torch": Wrong(
        lambda: zf.train_step(summed, torch.optim.SGD([torch.nn.Parameter(W)], 0.1)),
        TypeError,
        "tx must be a GradientTransformation such as zf.optim.adamw(3e-4), got SGD ...",
    ),
    "transformations in a list": Wrong(
        lambda: make(summed, [zf.accumulate(2)]),
        TypeError,
        "[<function accumulate(2) at 0x...>] is not a transformation of a TrainStep: "
        "call its maker, as in zf.partition(zero=3).",
    ),
    "a transformation that makes no step": Wrong(
        lambda: make(summed, lambda step: None),
        TypeError,
        "<function ...> is not a transformation of a TrainStep: call its maker, as in "
        "zf.partition(zero=3).",
    ),
    "partition that is not called": Wrong(
        lambda: make(summed, zf.partition),
        TypeError,
        "partition makes a transformation: write zf.partition(zero=3)",
    ),
    "accumulate that is not called": Wrong(
        lambda: make(summed, zf.accumulate),
        ValueError,
        "accumulate: num_microbatches is an int >= 1, got <TrainStep ...>",
    ),
    "precision that is not called": Wrong(
        lambda: make(summed, zf.precision),
        TypeError,
        "precision takes a string or a Policy, got <TrainStep ...>",
    ),
    "donate among the transformations": Wrong(
        lambda: make(summed, zf.donate),
        TypeError,
        "<function donate at 0x...> is not a transformation of a TrainStep: call its "
        "maker, as in zf.partition(zero=3).",
    ),
    "donate of a function": Wrong(
        lambda: zf.donate(zf.donate(make())),
        TypeError,
        "donate takes a TrainStep, got a function",
    ),
    "a state that is none": Wrong(
        lambda: make()({"params": W}, None),
        TypeError,
        "a step takes the TrainState made by zf.shard(params, mesh), got a dict.",
    ),
    "a state that was donated": Wrong(
        donated_twice,
        zf.DonatedBufferError,
        "state.params['w'] was donated to a step and its memory reused: keep the state "
        "that the step returned (state = step(state, batch)), or do not donate.",
    ),
    "a plain state to donate": Wrong(
        lambda: zf.donate(make())(zf.unshard(zf.shard(params_of(), alone())), None),
        zf.PlacementError,
        "params['w'] is a plain tensor, which a step cannot take over: make the state "
        "with zf.shard(params, mesh), or do not donate.",
    ),
}

PARTITION = {
    "a stage that does not exist": Wrong(
        lambda: zf.partition(zero=4),
        ValueError,
        "partition: zero is the stage 0, 1, 2 or 3; got 4",
    ),
    "a dtype that is text": Wrong(
        lambda: zf.partition(zero=1, gather_dtype="bf16"),
        ValueError,
        "partition: gather_dtype is a floating torch.dtype such as torch.bfloat16; got "
        "'bf16'",
    ),
    "a dtype of integers": Wrong(
        lambda: zf.partition(zero=1, reduce_dtype=torch.int8),
        ValueError,
        "partition: reduce_dtype is a floating torch.dtype such as torch.bfloat16; got "
        "torch.int8",
    ),
    "a gather at stage 0": Wrong(
        lambda: zf.partition(zero=0, gather_dtype=torch.bfloat16),
        ValueError,
        "partition: stage 0 gathers nothing: leave gather_dtype out",
    ),
    "a threshold that is no count": Wrong(
        lambda: zf.partition(zero=3, persistence_threshold=1e5),
        ValueError,
        "partition: persistence_threshold counts elements; got 100000.0",
    ),
    "a threshold at stage 1": Wrong(
        lambda: zf.partition(zero=1, persistence_threshold=9),
        ValueError,
        "partition: persistence_threshold is for zero=3; stage 1 gathers every leaf "
        "once per step already",
    ),
    "no partition on a mesh of 2": Wrong(
        lambda: simulated(make(), {"data": 2}),
        zf.PlacementError,
        "params['w'] lives on the mesh {'data': 2} but no transformation of this step "
        "uses it: add zf.partition(zero=..., axis='data') to zf.train_step.",
    ),
    "a plain state": Wrong(
        lambda: plain_state(zf.partition(zero=1)),
        zf.PlacementError,
        "params['w'] has no placement: make the state with zf.shard(params, mesh). (A "
        "step may have one partition only.)",
    ),
    "partition twice": Wrong(
        lambda: run(summed, zf.partition(zero=1), zf.partition(zero=2), mesh=one_rank),
        zf.PlacementError,
        "params['w'] has no placement: make the state with zf.shard(params, mesh). (A "
        "step may have one partition only.)",
    ),
    "partition twice at stage 3": Wrong(
        lambda: run(summed, zf.partition(zero=3), zf.partition(zero=3), mesh=one_rank),
        zf.PlacementError,
        "...step may have one partition only...",
    ),
    "a sharded state at stage 0": Wrong(
        lambda: run(summed, zf.partition(zero=0), mesh=one_rank),
        zf.PlacementError,
        "params['w'] is sharded over 'data', and stage 0 keeps the state whole: make "
        "it with zf.shard(params, mesh, spec=zf.P()), or use zero=1, 2 or 3.",
    ),
    "a state over another axis": Wrong(
        lambda: simulated(
            make(summed, zf.partition(zero=1)),
            {"data": 2, "tensor": 2},
            spec=zf.P("tensor"),
        ),
        zf.PlacementError,
        "params['w'] is sharded over ['tensor'], which no transformation of this step "
        "handles: use 'data' only.",
    ),
    "an axis that the state does not have": Wrong(
        lambda: run(summed, zf.partition(zero=1, axis="dp"), mesh=one_rank),
        zf.MeshError,
        "axis 'dp' is not an axis of the mesh {'data': 1}; its axes: 'data'",
    ),
}

OTHERS = {
    "a dtype that is none": Wrong(
        lambda: zf.precision("fp8"),
        ValueError,
        "precision: cannot read 'compute=fp8' in 'compute=fp8'; expected 'bf16', "
        "'fp16', 'fp32' or 'compute=DTYPE,output=DTYPE' with DTYPE one of bf16, fp16, "
        "f32, f64.",
    ),
    "a policy of integers": Wrong(
        lambda: zf.Policy(torch.int32),
        ValueError,
        "precision: compute is torch.int32; it must be one of bf16, fp16, f32, f64.",
    ),
    "a loss scale in words": Wrong(
        lambda: zf.precision("fp16", loss_scale="auto"),
        TypeError,
        "precision: loss_scale is 'auto', expected a number, 'dynamic' or a "
        "zf.DynamicLossScale(...); type for example loss_scale=2.0**16",
    ),
    "a loss scale of 0": Wrong(
        lambda: zf.precision("fp16", loss_scale=0),
        ValueError,
        "StaticLossScale: scale is 0.0, expected more than 0 and at most 2**100; type "
        "for example scale=1.0",
    ),
    "a window of 0": Wrong(
        lambda: zf.DynamicLossScale(loss_scale_window=0),
        ValueError,
        "DynamicLossScale: loss_scale_window is 0, expected 1 to 4611686018427387904; "
        "type for example loss_scale_window=1000",
    ),
    "a smallest scale above the first": Wrong(
        lambda: zf.DynamicLossScale(initial_scale_power=1, min_loss_scale=4),
        ValueError,
        "DynamicLossScale: min_loss_scale is 4, more than the first scale of 2**1; "
        "raise initial_scale_power",
    ),
    "a dtype as a policy": Wrong(
        lambda: zf.precision(torch.bfloat16),
        TypeError,
        "precision takes a string or a Policy, got torch.bfloat16",
    ),
    "the storage dtype in a policy": Wrong(
        lambda: zf.precision("params=bf16,compute=bf16"),
        ValueError,
        "precision: the storage dtype belongs to the state: zf.shard(params, mesh, "
        "dtype=...)",
    ),
    "no microbatches": Wrong(
        lambda: zf.accumulate(0),
        ValueError,
        "accumulate: num_microbatches is an int >= 1, got 0",
    ),
    "a batch that does not divide": Wrong(
        lambda: run(summed, zf.accumulate(4), batch=BATCH),
        ValueError,
        "accumulate(4): batch['x'] has 6 samples on this rank, which 4 does not "
        "divide: give a multiple of 4, or another num_microbatches.",
    ),
    "a captured parameter": Wrong(
        lambda: run(lambda p, b: zf.remat(lambda: p["w"].sum())()),
        zf.RematError,
        "the block '<lambda>' given to remat uses a tensor of shape (6, 2) that is "
        "being differentiated but is not an argument: its gradient would be silently "
        "wrong. Pass it in:\n"
        "  wrong: remat(lambda x: x @ w)(x)\n"
        "  right: remat(lambda w, x: x @ w)(w, x)",
    ),
    "a block that returns a number": Wrong(
        lambda: zf.remat(lambda w: 1.0)(W),
        zf.RematError,
        "the block '<lambda>' given to remat returned a float: return tensors (or a "
        "pytree of them).",
    ),
    "a dropout of everything": Wrong(
        lambda: zf.random.dropout(torch.tensor(0), W, 1.0),
        ValueError,
        "dropout rate must be in [0, 1), got 1.0",
    ),
    "keys that do not fit": Wrong(
        lambda: zf.random.dropout(torch.arange(3), W, 0.5),
        ValueError,
        "dropout: the key has shape (3,), which is not how (6, 2) begins: give one key "
        "per sample.",
    ),
    "stacked arguments of too few ranks": Wrong(
        lambda: spmd(lambda m, x: x, {"data": 3})({"x": torch.ones(2)}),
        ValueError,
        "argument 0/x: the first dim must be the 3 ranks of {'data': 3}; got shape "
        "(2,). (torch.stack one per rank.)",
    ),
    "a batch that the ranks do not divide": Wrong(
        lambda: split_batch(BATCH, {"data": 4}),
        ValueError,
        "batch['x'] has 6 samples, which the 4 ranks of axis 'data' do not divide: "
        "give a multiple of 4.",
    ),
    "a DTensor of no processes": Wrong(
        lambda: zf.to_dtensor(zf.shard(params_of(), one_rank()).params),
        zf.PlacementError,
        "to_dtensor needs a mesh of processes, not a local one: make it with "
        "zf.make_mesh under torchrun.",
    ),
}

ALL = {
    f"{title}: {name}": wrong
    for title, group in {
        "mesh": MESH,
        "placement": PLACEMENT,
        "structure": STRUCTURE,
        "loss": LOSS,
        "step": STEP,
        "partition": PARTITION,
        "others": OTHERS,
    }.items()
    for name, wrong in group.items()
}


@pytest.mark.parametrize("name", ALL)
def test_the_message(name):
    use, error, message = ALL[name]
    with pytest.raises(error) as caught:
        use()
    pattern = ".*".join(map(re.escape, message.split("...")))
    got = str(caught.value)
    assert re.fullmatch(pattern, got, re.DOTALL), f"\n{got}\n--- expected\n{message}"
    assert len(got.splitlines()) <= 12


def test_errors_are_caught_by_their_builtin_class_too():
    for error, builtin in {
        zf.MeshError: ValueError,
        zf.PlacementError: ValueError,
        zf.StructureError: ValueError,
        zf.LossError: TypeError,
        zf.RematError: RuntimeError,
        zf.DonatedBufferError: RuntimeError,
        zf.CheckpointError: ValueError,
    }.items():
        assert issubclass(error, builtin)
        assert issubclass(error, zf.ZfuncError)


def test_frozen_things_say_so():
    for frozen in (
        zf.shard(params_of(), alone()),
        zf.make_mesh({}),
        zf.Policy(torch.bfloat16),
    ):
        field = dataclasses.fields(frozen)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError, match=field):
            setattr(frozen, field, None)
