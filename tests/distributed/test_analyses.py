# SPDX-License-Identifier: Apache-2.0
"""What a program says of itself, against what real ranks send and keep alive."""

import collections

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

import zfunc as zf
from tests.unit.program.programs import (
    BATCH,
    Setting,
    as_donated,
    inputs_of,
    measured_peak,
    model,
)
from zfunc.program.listing import dtype_text, op_name

pytestmark = pytest.mark.distributed
WORLD = 2
TOLERANCE = 0.05
# gloo's threads may let go of a message's input some moments after its wait (one run
# in eight on a busy machine): of several runs the lowest is the program's own peak.
RUNS = 8
SETTINGS = (
    Setting(zero=0, clip=True),
    Setting(zero=1, microbatches=2),
    Setting(zero=2, microbatches=2, precision="bf16"),
    Setting(zero=3),
    Setting(zero=3, microbatches=4),
)


class Counter(TorchDispatchMode):
    """Messages and bytes of the collectives that are called, by kind and dtype."""

    def __init__(self):
        super().__init__()
        self.found = collections.defaultdict(lambda: [0, 0, 0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        kind = op_name(func)
        if func.namespace == "_c10d_functional" and kind != "wait":
            full_bytes = max(args[0].nbytes, out.nbytes)
            passes = 2 if kind == "all_reduce" else 1
            row = self.found[kind, dtype_text(out.dtype)]
            row[0] += 1
            row[1] += full_bytes
            row[2] += passes * full_bytes * (WORLD - 1) // WORLD
        return out


def prepared(name, setting, donate=False):
    """The jitted step, its program, a state and this rank's batch."""
    mesh = zf.make_mesh({"data": WORLD})
    loss, params, batch = model(name)
    first = int(mesh.axis_index("data")) * BATCH // WORLD
    mine = zf.tree_map(lambda x: x[first : first + BATCH // WORLD].clone(), batch)
    jitted = zf.jit(setting.step(loss), donate=donate)
    state = setting.state(params, mesh)
    return jitted, jitted.lower(state, mine), state, mine


def counted(name, setting):
    """(what the program says, what is called) when the step runs."""
    jitted, program, state, batch = prepared(name, setting)
    state = jitted(state, batch)  # traces
    with Counter() as counter:
        jitted(state, batch)
    analysis = program.comm_analysis()
    said = {
        (row.kind, row.dtype): [row.count, row.payload_bytes, row.sent_bytes]
        for row in analysis.rows
    }
    return said, dict(counter.found), analysis.total_bytes


def peaks(name, setting, donated):
    """(predicted, measured) bytes of the program on this rank."""
    _, program, state, batch = prepared(name, setting)
    program = as_donated(program, donated)
    predicted = program.memory_analysis().peak_bytes
    measured = [measured_peak(program, inputs_of(state, batch)) for _ in range(RUNS)]
    return predicted, min(measured)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_bytes_in_the_program_are_bytes_sent(ranks, name, setting):
    for said, called, total_bytes in ranks(WORLD).run(counted, name, setting):
        assert said == called
        assert total_bytes == sum(sent for _, _, sent in called.values())


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_predicted_peak_is_measured(ranks, name, setting):
    for donated in ("nothing", "state"):
        for predicted, measured in ranks(WORLD).run(peaks, name, setting, donated):
            assert predicted == pytest.approx(measured, rel=TOLERANCE), donated
