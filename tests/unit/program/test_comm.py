# SPDX-License-Identifier: Apache-2.0
"""``Program.comm_analysis`` on programs written by hand; the steps are law L16's."""

import pytest
import torch
from torch.fx import Graph

import zfunc as zf
from tests.unit.program.programs import (
    Setting,
    abstract_program,
    mlp,
    mlp_params,
    normal,
)
from zfunc.program import ir
from zfunc.program.comm import sent_bytes
from zfunc.transforms.loop import SumOver

GROUPS = (("g4", "data", 4), ("g2", "tensor", 2))


def started(graph, op, x, *args):
    node = graph.call_function(op, (x, *args))
    value = x.meta["val"]
    size = value.shape[0]
    if op is ir.ALL_GATHER:
        size *= args[0]
    if op is ir.REDUCE_SCATTER:
        size //= args[1]
    node.meta["val"] = value.new_empty(size)
    return node


def program(build, dtype=torch.float32):
    """A program of one input of 16 elements, written by ``build(graph, x)``."""
    mode = torch._subclasses.FakeTensorMode()
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(torch.ones(16, dtype=dtype))
    with mode:
        graph.output(build(graph, x))
    return zf.Program(graph, ("batch",), ("params",), (), GROUPS, "cpu")


def every_kind(graph, x):
    return [
        started(graph, ir.ALL_GATHER, x, 4, "g4"),
        started(graph, ir.REDUCE_SCATTER, x, "sum", 4, "g4"),
        started(graph, ir.ALL_REDUCE, x, "sum", "g4"),
        started(graph, ir.ALL_TO_ALL, x, [4] * 4, [4] * 4, "g4"),
        started(graph, ir.ALL_REDUCE, x, "sum", "g2"),
    ]


def test_every_kind():
    rows = program(every_kind).comm_analysis().rows
    found = [(r.kind, r.axis, r.payload_bytes, r.sent_bytes) for r in rows]
    assert found == [
        ("all_gather", "data", 256, 192),
        ("reduce_scatter", "data", 64, 48),
        ("all_reduce", "data", 64, 96),
        ("all_to_all", "data", 64, 48),
        ("all_reduce", "tensor", 64, 64),
    ]


def test_equal_collectives_are_one_row_and_dtypes_are_not():
    def twice(graph, x):
        return [started(graph, ir.ALL_REDUCE, x, "sum", "g4") for _ in range(2)]

    (row,) = program(twice).comm_analysis().rows
    assert (row.count, row.payload_bytes, row.sent_bytes) == (2, 128, 192)
    (row,) = program(twice, torch.bfloat16).comm_analysis().rows
    assert (row.dtype, row.axis_size, row.sent_bytes) == ("bf16", 4, 96)


def test_a_loop_sends_as_often_as_it_runs():
    body = program(every_kind).graph
    inner = program(lambda graph, x: [graph.call_function(SumOver(body, 3, 0), (x,))])
    outer = program(
        lambda graph, x: [graph.call_function(SumOver(inner.graph, 2, 0), (x,))]
    )
    once, often = program(every_kind).comm_analysis(), outer.comm_analysis()
    assert often.total_bytes == 6 * once.total_bytes
    assert often.total_count == 30


def test_a_program_of_one_rank_sends_nothing():
    setting = Setting(zero=3, microbatches=2)
    alone = abstract_program(mlp, mlp_params(8, 2), normal(4, 8), setting, 1)
    assert alone.comm_analysis().rows == ()
    assert alone.comm_analysis().total_bytes == 0


@pytest.mark.parametrize("n", [2, 3, 7])
def test_fractions_of_bytes_round_up(n):
    assert sent_bytes("all_reduce", 4, n) == -(-8 * (n - 1) // n)


def test_a_table_for_people():
    text = str(program(every_kind).comm_analysis())
    assert text.splitlines()[1].split() == [
        *("all_gather", "data=4", "f32", "1", "256", "B", "192", "B")
    ]
    assert text.splitlines()[-1].split() == ["total", "5", "448", "B"]
