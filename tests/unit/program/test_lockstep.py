# SPDX-License-Identifier: Apache-2.0
"""The lockstep interpreter: right programs run, wrong ones are named and refused."""

import dataclasses

import pytest
import torch
from torch.fx import Graph

import zfunc as zf
from zfunc.program import ir
from zfunc.testing import LockstepError, lockstep, run_lockstep, simulate

aten = torch.ops.aten
TWO = (("data", "data", 2),)
GRID = (("data", "data", 2), ("tensor", "tensor", 2))


def program(build, groups=TWO):
    """A program of one input x, written by ``build(graph, x)``."""
    graph = Graph()
    x = graph.placeholder("x")
    graph.output([build(graph, x)])
    return zf.Program(graph, ("x",), ("y",), (), groups, "cpu")


def start(graph, op, x, *args):
    return graph.call_function(op, (x, *args))


def wait(graph, x):
    return graph.call_function(ir.WAIT, (x,))


def reduced(graph, x, group="data"):
    return wait(graph, start(graph, ir.ALL_REDUCE, x, "sum", group))


def gathered(graph, x, group="data"):
    return wait(graph, start(graph, ir.ALL_GATHER, x, 2, group))


def rows(*values):
    return [[torch.tensor(v)] for v in values]


def outputs(programs, args):
    return [out[0].tolist() for out in run_lockstep(programs, args)]


def test_the_collectives():
    def everything(graph, x):
        y = gathered(graph, x)
        return wait(graph, start(graph, ir.REDUCE_SCATTER, y, "sum", 2, "data"))

    values = rows([1.0, 2.0], [3.0, 4.0])
    assert outputs([program(gathered)] * 2, values) == [[1.0, 2.0, 3.0, 4.0]] * 2
    assert outputs([program(reduced)] * 2, values) == [[4.0, 6.0]] * 2
    assert outputs([program(everything)] * 2, values) == [[2.0, 4.0], [6.0, 8.0]]


def test_an_uneven_exchange():
    def exchange(receive, send):
        def build(graph, x):
            return wait(graph, start(graph, ir.ALL_TO_ALL, x, receive, send, "data"))

        return program(build)

    programs = [exchange([1, 2], [1, 0]), exchange([0, 0], [2, 0])]
    assert outputs(programs, rows([1.0], [2.0, 3.0])) == [[1.0, 2.0, 3.0], []]
    wrong = [exchange([1, 1], [1, 0]), exchange([0, 0], [2, 0])]
    with pytest.raises(LockstepError, match="pieces of other sizes"):
        run_lockstep(wrong, rows([1.0], [2.0, 3.0]))


def test_sums_in_float32_and_in_the_order_of_the_ranks():
    big, small = torch.tensor([1e30]), torch.tensor([1.0])
    three = (("data", "data", 3),)
    got = run_lockstep([program(reduced, three)] * 3, [[big], [-big], [small]])
    assert [out[0].item() for out in got] == [1.0] * 3
    halves = [[x.bfloat16()] for x in (torch.tensor([256.0]), small, small)]
    got = run_lockstep([program(reduced, three)] * 3, halves)
    assert [out[0].item() for out in got] == [258.0] * 3


def test_each_axis_of_a_mesh_has_its_groups():
    values = rows(1.0, 10.0, 100.0, 1000.0)
    along_data = outputs([program(reduced, GRID)] * 4, values)
    assert along_data == [101.0, 1010.0, 101.0, 1010.0]

    def tensor(graph, x):
        return reduced(graph, x, "tensor")

    assert outputs([program(tensor, GRID)] * 4, values) == [11.0, 11.0, 1100.0, 1100.0]


def test_ranks_at_different_messages():
    with pytest.raises(LockstepError) as caught:
        run_lockstep([program(reduced), program(gathered)], rows([1.0], [2.0]))
    assert str(caught.value) == (
        "ranks 0, 1 are at different messages:\n"
        "  rank 0: all_reduce(f32[1]) along 'data' at node 1 (all_reduce_default)\n"
        "  rank 1: all_gather_into_tensor(f32[1]) along 'data' at node 1 "
        "(all_gather_into_tensor_default)"
    )


@pytest.mark.parametrize("other", [[1.0], [1, 2]])
def test_ranks_that_send_other_shapes_or_dtypes(other):
    with pytest.raises(LockstepError, match="are at different messages"):
        run_lockstep([program(reduced)] * 2, rows([1.0, 2.0], other))


def test_a_rank_that_returns_too_early():
    programs = [program(reduced), program(lambda graph, x: x)]
    with pytest.raises(LockstepError, match="wait for a rank that has returned") as e:
        run_lockstep(programs, rows([1.0], [1.0]))
    assert "rank 1: returned" in str(e.value)


def test_a_cycle_of_ranks_that_wait_for_each_other():
    def data_first(graph, x):
        return reduced(graph, reduced(graph, x, "data"), "tensor")

    def tensor_first(graph, x):
        return reduced(graph, reduced(graph, x, "tensor"), "data")

    programs = [program(f, GRID) for f in (data_first, tensor_first) * 2]
    programs[2:] = reversed(programs[2:])
    with pytest.raises(LockstepError, match="ranks 0, 1, 2, 3 wait for each other"):
        run_lockstep(programs, rows(1.0, 2.0, 3.0, 4.0))


def test_a_result_before_its_wait():
    def early(graph, x):
        moved = start(graph, ir.ALL_REDUCE, x, "sum", "data")
        doubled = graph.call_function(aten.add.Tensor, (moved, moved))
        wait(graph, moved)
        return doubled

    with pytest.raises(LockstepError, match=r"node 2 \(add.*started at node 1"):
        run_lockstep([program(early)] * 2, rows([1.0], [1.0]))


def test_a_result_that_is_returned_and_never_waited_for():
    def never(graph, x):
        return start(graph, ir.ALL_REDUCE, x, "sum", "data")

    with pytest.raises(LockstepError, match="before waiting for it"):
        run_lockstep([program(never)] * 2, rows([1.0], [1.0]))


def test_a_message_that_nobody_waits_for():
    def lost(graph, x):
        start(graph, ir.ALL_REDUCE, x, "sum", "data")
        return x

    with pytest.raises(LockstepError, match="never waits for all_reduce"):
        run_lockstep([program(lost)] * 2, rows([1.0], [1.0]))


def test_a_view_may_be_taken_before_the_wait_and_read_after_it():
    def looked_at(graph, x):
        moved = start(graph, ir.ALL_REDUCE, x, "sum", "data")
        view = graph.call_function(aten.view.default, (moved, [2]))
        wait(graph, moved)
        return graph.call_function(aten.neg.default, (view,))

    assert (
        outputs([program(looked_at)] * 2, rows([[1.0, 2.0]], [[1.0, 2.0]]))
        == [[-2.0, -4.0]] * 2
    )


@pytest.mark.parametrize("written", ["input", "result"])
def test_what_is_written_while_a_message_is_under_way(written):
    def writing(graph, x):
        moved = start(graph, ir.ALL_REDUCE, x, "sum", "data")
        target = x if written == "input" else moved
        view = graph.call_function(aten.view.default, (target, [-1]))
        graph.call_function(aten.zero_.default, (view,))
        return wait(graph, moved)

    pattern = "the input of" if written == "input" else "before waiting|the result of"
    with pytest.raises(LockstepError, match=pattern):
        run_lockstep([program(writing)] * 2, rows([1.0], [1.0]))


def test_the_arguments_are_not_written_to():
    def in_place(graph, x):
        return graph.call_function(aten.mul_.Tensor, (x, 2.0))

    values = rows([1.0], [2.0])
    assert outputs([program(in_place)] * 2, values) == [[2.0], [4.0]]
    assert [v[0].item() for v in values] == [1.0, 2.0]


def test_one_program_per_rank():
    with pytest.raises(ValueError, match="got 1 programs"):
        run_lockstep([program(reduced)], rows([1.0]))


def test_other_reductions_are_not_guessed():
    def maximum(graph, x):
        return wait(graph, start(graph, ir.ALL_REDUCE, x, "max", "data"))

    with pytest.raises(NotImplementedError, match="reduces by 'max'"):
        run_lockstep([program(maximum)] * 2, rows([1.0], [2.0]))


@pytest.mark.parametrize("mesh_shape", [{"data": 3}, {"data": 2, "tensor": 2}])
def test_lockstep_is_simulate(mesh_shape):
    step = zf.train_step(
        lambda p, b: (torch.tanh(b @ p["w"]) * p["s"]).square().mean(),
        zf.optim.adam(0.1),
        zf.partition(zero=3),
        zf.accumulate(2),
    )
    params = {"w": torch.arange(5.0) / 5, "s": torch.tensor(2.0)}
    sim, lock = simulate(step, mesh_shape), lockstep(step, mesh_shape)
    want = got = sim.shard(params)
    batch = torch.randn(sim.num_ranks, 4, 5, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        want, got = sim(want, batch), lock(got, batch)
    assert not zf.testing.differences(got, want)
    assert zf.tree_map(lambda x: 0, got) == zf.tree_map(lambda x: 0, want)


def test_programs_may_be_lowered_once():
    step = zf.train_step(
        lambda p, b: (p * b).sum(), zf.optim.sgd(1.0), zf.partition(zero=3)
    )
    two = lockstep(step, {"data": 2})
    state, batch = two.shard(torch.ones(3)), torch.ones(2, 3)
    programs = two.lower(state, batch)
    lost = [dataclasses.replace(p, constants=()) for p in programs]
    assert two(state, batch, lost).metrics.loss.tolist() == [3.0, 3.0]
