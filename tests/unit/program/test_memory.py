# SPDX-License-Identifier: Apache-2.0
"""``Program.memory_analysis``: the predicted peak is the measured one."""

import dataclasses

import pytest
import torch
from torch.fx import Graph

import zfunc as zf
from tests.unit.program.programs import (
    BATCH,
    Setting,
    abstract_program,
    as_donated,
    inputs_of,
    measured_peak,
    mlp,
    mlp_params,
    model,
    normal,
)
from zfunc.core.tree import tree_leaves
from zfunc.program import ir
from zfunc.program.listing import numbered
from zfunc.program.passes import regather, sink
from zfunc.testing.memory import peak_live_bytes
from zfunc.transforms.loop import SumOver

aten = torch.ops.aten
# The bound that is promised; on this backend they are equal but for shared scalars.
TOLERANCE = 0.05
KIB = 256  # elements of a float32 tensor of 1 KiB
MODELS = ("mlp", "conv", "classifier", "gpt", "gpt_remat")
SETTINGS = (
    Setting(zero=0),
    Setting(zero=0, microbatches=2, precision="bf16"),
    Setting(zero=1, microbatches=4),
    Setting(zero=2, microbatches=2),
    Setting(zero=3, clip=True),
    Setting(zero=3, microbatches=2),
    Setting(zero=3, microbatches=4, precision="bf16"),
)


def lowered(name, setting, **options):
    loss, params, batch = model(name)
    state = setting.state(params, zf.make_mesh({"data": 1}))
    program = zf.jit(setting.step(loss), **options).lower(state, batch)
    return program, state, batch


def written(build, donated=()):
    """A program of one input of 1 KiB, written by ``build(graph, x)``."""
    mode = torch._subclasses.FakeTensorMode()
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(torch.ones(KIB))
    with mode:
        graph.output(build(graph, x))
    inputs, outputs = ("batch",), ("params",) * len(ir.outputs_of(graph))
    groups = (("g", "data", 2),)
    return zf.Program(graph, inputs, outputs, (), groups, "cpu", frozenset(donated))


def peak_kib(program):
    return program.memory_analysis().peak_bytes / 1024


# --- against what is measured ------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_predicted_is_measured(name, setting):
    program, state, batch = lowered(name, setting)
    for donated in ("nothing", "state", "all"):
        given = as_donated(program, donated)
        predicted = given.memory_analysis().peak_bytes
        measured = measured_peak(given, inputs_of(state, batch))
        assert predicted == pytest.approx(measured, rel=TOLERANCE), donated


@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_predicted_is_measured_without_passes(name):
    for setting in (Setting(zero=1), Setting(zero=3, microbatches=2)):
        program, state, batch = lowered(name, setting, passes=())
        predicted = program.memory_analysis().peak_bytes
        measured = measured_peak(program, inputs_of(state, batch))
        assert predicted == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_predicted_is_measured_around_the_jitted_step(name, donate):
    setting = Setting(zero=3, microbatches=2)
    loss, params, batch = model(name)
    jitted = zf.jit(setting.step(loss), donate=donate)
    mesh = zf.make_mesh({"data": 1})
    predicted = jitted.lower(setting.state(params, mesh), batch).memory_analysis()
    jitted(setting.state(params, mesh), batch)  # traces: fakes are no memory
    box = [setting.state(params, mesh).replace(grads=None)]
    if donate:
        _, measured = peak_live_bytes(
            lambda box, batch: jitted(box.pop(), batch), box, batch, donated=True
        )
    else:
        _, measured = peak_live_bytes(jitted, box[0], batch)
    assert predicted.peak_bytes == pytest.approx(measured, rel=TOLERANCE)


def test_constants_of_the_loss_are_counted():
    table = normal(64, 32)
    loss = lambda params, x: (x @ params @ table).square().mean()  # noqa: E731
    state = zf.shard(normal(32, 64), zf.make_mesh({}), tx=zf.optim.sgd(0.1))
    step = zf.train_step(loss, zf.optim.sgd(0.1))
    program = zf.jit(step).lower(state, normal(BATCH, 32))
    found = program.memory_analysis()
    assert found.by_kind.constants == table.nbytes
    measured = measured_peak(program, inputs_of(state, normal(BATCH, 32)))
    assert found.peak_bytes == pytest.approx(measured, rel=TOLERANCE)


# --- on graphs written by hand -----------------------------------------------------


def test_a_value_dies_after_its_last_use():
    def chain(graph, x):
        for _ in range(5):
            x = ir.emit(graph, aten.neg.default, x)
        return [x]

    assert peak_kib(written(chain)) == 3  # the input, which stays, and two of the chain
    assert peak_kib(written(chain, donated=["batch"])) == 2


def test_views_have_the_memory_of_their_base():
    def views(graph, x):
        y = ir.emit(graph, aten.neg.default, x)
        row = ir.emit(graph, aten.slice.Tensor, y, 0, 0, 1)
        z = ir.emit(graph, aten.exp.default, x)  # all of y is alive, for one element
        return [ir.emit(graph, aten.add.Tensor, z, row)]

    assert peak_kib(written(views)) == 4


def test_what_is_returned_stays_and_what_nobody_uses_goes():
    def unused(graph, x):
        for _ in range(5):
            ir.emit(graph, aten.neg.default, x)
        return [ir.emit(graph, aten.neg.default, x), x]

    assert peak_kib(written(unused, donated=["batch"])) == 2


def test_a_message_keeps_its_input_until_it_is_waited_for():
    def sending(graph, x, waits_first):
        sent = ir.emit(graph, aten.neg.default, x)
        start = graph.call_function(ir.ALL_REDUCE, (sent, "sum", "g"))
        start.meta["val"] = x.meta["val"].new_empty(KIB)
        order = [ir.WAIT, aten.exp.default]
        made = {}
        for op in order if waits_first else reversed(order):
            made[op] = graph.call_function(op, (start if op is ir.WAIT else x,))
            # As fake tensors have it: what a wait returns has its own memory.
            made[op].meta["val"] = x.meta["val"].new_empty(KIB)
        return [*made.values(), ir.emit(graph, aten.neg.default, x)]

    # x, what arrives, exp, neg; and what is sent while exp is computed.
    waits_last = written(lambda graph, x: sending(graph, x, waits_first=False))
    waits_first = written(lambda graph, x: sending(graph, x, waits_first=True))
    assert [m.bytes.total // 1024 for m in waits_first.memory_analysis().timeline] == [
        *(1, 2, 3, 2, 3, 4)
    ]
    assert [m.bytes.total // 1024 for m in waits_last.memory_analysis().timeline] == [
        *(1, 2, 3, 4, 3, 4)
    ]


@pytest.mark.parametrize("n", [2, 4])
def test_a_loop_needs_its_body_and_its_sums(n):
    def body(graph, x):
        a = ir.emit(graph, aten.neg.default, x)
        b = ir.emit(graph, aten.exp.default, a)
        return [ir.emit(graph, aten.add.Tensor, a, b)]

    def loop(graph, x):
        node = graph.call_function(SumOver(written(body).graph, n, 0), (x,))
        node.meta["val"] = [x.meta["val"].new_empty(KIB)]
        return [node]

    # The operand; the sum so far; a, b and a + b.
    assert peak_kib(written(loop)) == 5


def test_targets_that_passes_make():
    def halves(x):
        return x[:2].clone(), x[2:].clone()

    def called(graph, x):
        pair = graph.call_function(halves, (x,))
        pair.meta["val"] = (x.meta["val"].new_empty(2), x.meta["val"].new_empty(KIB))
        return [pair]

    found = written(called).memory_analysis()
    assert found.peak_bytes == 2 * 1024 + 8
    assert found.place == "%1 halves f32[2], f32[256]"


# --- kinds, place, timeline --------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_byte_has_its_kind(zero):
    num_ranks, setting = 4, Setting(zero=zero)
    params, batch = mlp_params(32, 6), normal(64, 32)
    found = abstract_program(
        mlp, params, batch, setting, num_ranks, passes=(), donate=False
    ).memory_analysis()
    start, end = found.timeline[0].bytes, found.timeline[-1].bytes
    psi = sum(x.nbytes for x in tree_leaves(params))
    mine = psi if zero == 0 else psi // num_ranks
    counters = start.moments - 2 * mine
    assert 0 <= counters < 64
    assert (start.params, start.batch) == (mine, batch.nbytes)
    assert (start.gathered, start.grads, start.activations) == (0, 0, 0)
    # The old state and the new one.
    assert (end.params, end.moments) == (2 * mine, 2 * start.moments)
    assert (end.grads, end.activations, end.gathered) == (mine, 0, 0)
    most = {k: max(getattr(m.bytes, k) for m in found.timeline) for k in end._fields}
    assert most["activations"] == 6 * batch.nbytes  # each layer's tanh
    # Stages 0 to 2, as traced: whole gradients wait for the end of the backward.
    assert (most["grads"] >= psi) == (zero < 3)
    # What the first layer gathered is not used in the backward.
    assert most["gathered"] >= {0: 0, 1: psi, 2: psi, 3: psi * 4 / 5}[zero]


def test_passes_make_a_gathered_weight_live_from_use_to_use():
    args = mlp, mlp_params(32, 6), normal(8, 32), Setting(zero=3), 4
    layer = 4 * (32 * 32 + 32)
    traced = abstract_program(*args, passes=()).memory_analysis()
    short = abstract_program(*args, passes=(sink, regather)).memory_analysis()
    assert max(m.bytes.gathered for m in traced.timeline) > 4 * layer
    assert max(m.bytes.gathered for m in short.timeline) <= layer
    assert short.peak_bytes < traced.peak_bytes


def test_gradients_of_a_loop_are_gradients():
    setting = Setting(zero=0, microbatches=2)
    params = mlp_params(32, 6)
    found = abstract_program(mlp, params, normal(8, 32), setting, 4).memory_analysis()
    psi = sum(x.nbytes for x in tree_leaves(params))
    most = max(m.bytes.grads for m in found.timeline)
    assert 2 * psi <= most <= 3.1 * psi  # those of a microbatch, and the sums


def test_copies_of_weights_in_another_dtype_are_gathered():
    program, *_ = lowered("gpt", Setting(zero=3, precision="bf16"))
    found = program.memory_analysis()
    assert max(m.bytes.gathered for m in found.timeline) > 0


def test_the_place_of_the_peak_is_a_line_of_the_text():
    program, *_ = lowered("gpt", Setting(zero=3, microbatches=2))
    found = program.memory_analysis()
    number, op = found.place.split()[:2]
    (line,) = [x for x in program.as_text().splitlines() if x.split()[:1] == [number]]
    assert f" {op}(" in line
    assert number == f"%{found.peak.index}"


def test_the_timeline_has_every_value_once_and_the_peak():
    program, *_ = lowered("mlp", Setting(zero=3, microbatches=2))
    found = program.memory_analysis()
    calls = [i for n, i in numbered(program.graph).items() if n.op == "call_function"]
    assert {m.index for m in found.timeline}.issuperset(calls)
    assert found.peak in found.timeline
    assert found.peak_bytes == max(sum(m.bytes) for m in found.timeline)
    assert found.by_kind.total == found.peak_bytes
    assert found == program.memory_analysis()
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.place = ""


def test_a_table_for_people():
    program, *_ = lowered("mlp", Setting())
    lines = str(program.memory_analysis()).splitlines()
    assert lines[0].startswith("peak ")
    assert " at %" in lines[0]
    assert [line.split()[0] for line in lines[1:]][:2] == ["params", "grads"]
