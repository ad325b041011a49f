# SPDX-License-Identifier: Apache-2.0
"""``Program.as_text``: what it says, and that it is the same everywhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

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
    zero3,
)
from tests.unit.program.regenerate import GOLDEN
from zfunc.program import ir
from zfunc.program.listing import bytes_text, count_text, numbered, op_name
from zfunc.transforms.loop import SumOver

ROOT = Path(__file__).resolve().parents[3]
PRINT = "from tests.unit.program.programs import zero3; print(zero3().as_text())"


def scaled(x):
    return x * 2


class Doubler:
    """A target that a pass might make: an object that can be called."""

    __name__ = "doubled"

    def __call__(self, x):
        return x * 2


def by_hand(*targets):
    """A program that calls each target on the result of the one before."""
    mode = torch._subclasses.FakeTensorMode()
    graph = Graph()
    node = graph.placeholder("x")
    node.meta["val"] = mode.from_tensor(torch.ones(4))
    for target in targets:
        node = ir.emit(graph, target, node)
    graph.output([node])
    return zf.Program(graph, ("batch",), ("params",), (), (), "cpu")


def test_golden():
    """Regenerate it with ``python -m tests.unit.program.regenerate``."""
    assert zero3().as_text() == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_same_in_another_process(seed):
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", PRINT]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip() == zero3().as_text().rstrip()


def test_one_line_for_every_value_and_every_value_before_its_use():
    program = zero3()
    defined = re.findall(r"^ *(%\d+) ", program.as_text(), re.MULTILINE)
    assert defined == [f"%{i}" for i in range(len(defined))]
    assert len(defined) == len(set(numbered(program.graph).values()))
    known = set()
    for line in program.as_text().splitlines():
        name, *used = re.findall(r"%\d+", line) or [""]
        if re.match(r" *%\d+ ", line):
            known.add(name)
        assert known.issuperset(used), line


def test_inputs_and_outputs_go_by_their_paths():
    text = zero3().as_text()
    assert re.search(r"%2 +f32\[2, 8\] +64 B  params/layers/0/w", text)
    assert re.search(r"^  grads/layers/1/w = %\d+$", text, re.MULTILINE)
    assert "arg0" not in text


def test_a_loop_is_indented_and_says_what_it_cuts():
    text = zero3().as_text()
    assert "sum of 2 calls:" in text
    assert re.search(r"^    %\d+ .* piece of %19, one of 2 along dim 0$", text, re.M)
    assert re.search(r"^    return %\d+(, %\d+)+$", text, re.MULTILINE)


def test_collectives_go_by_name_and_axis():
    setting = Setting(zero=1)
    program = abstract_program(mlp, mlp_params(8, 2), normal(4, 8), setting, 4)
    text = program.as_text()
    for name in ("all_gather", "reduce_scatter", "all_reduce"):
        assert re.search(rf"{name}\(%\d+, over 'data'\)", text), name
    assert "c10d" not in text
    assert "abstract:" not in text


def test_targets_that_passes_make():
    text = by_hand(scaled, Doubler()).as_text()
    assert "scaled(%0)" in text
    assert "doubled(%1)" in text
    assert "0x" not in text


def test_loops_in_loops():
    body = by_hand(torch.ops.aten.neg.default).graph
    inner = by_hand(SumOver(body, 2, 1)).graph
    program = by_hand(SumOver(inner, 2, 1))
    text = program.as_text()
    assert len(numbered(program.graph)) == 6
    assert re.search(r"^      %4 .* piece of %2, one of 2", text, re.MULTILINE)
    assert re.search(r"^      %5 .* aten.neg\(%4\)$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.ops.aten.add.Tensor, "aten.add"),
        (torch.ops._c10d_functional.reduce_scatter_tensor.default, "reduce_scatter"),
        (torch.ops._c10d_functional.all_reduce_.default, "all_reduce"),
        (torch.ops._c10d_functional.wait_tensor.default, "wait"),
        (scaled, "scaled"),
        (SumOver(Graph(), 2, 0), "sum_over"),
    ],
)
def test_op_names(target, name):
    assert op_name(target) == name


def test_sizes_for_people():
    assert [bytes_text(2**i) for i in (9, 10, 25, 35, 45)] == [
        "512 B",
        "1.0 KiB",
        "32.0 MiB",
        "32.0 GiB",
        "32.0 TiB",
    ]
    assert [count_text(x) for x in (0, 999, 1.5e3, 2e6, 3e9, 4e12, 5e15)] == [
        "0",
        "999",
        "1.5 k",
        "2 M",
        "3 G",
        "4 T",
        "5 P",
    ]
