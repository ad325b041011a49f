# SPDX-License-Identifier: Apache-2.0
"""``Program.cost_analysis``: against counts by hand and against torch's counter."""

import dataclasses
import functools

import pytest
import torch
from torch.fx import Graph
from torch.utils.flop_counter import FlopCounterMode

import zfunc as zf
from tests.unit.program.programs import (
    BATCH,
    CONFIG,
    Setting,
    abstract_program,
    mlp,
    mlp_params,
    model,
    normal,
)
from zfunc.models import gpt
from zfunc.program import cost, ir
from zfunc.program.passes import DEFAULT
from zfunc.transforms.loop import SumOver

aten = torch.ops.aten
ROUND = cost.Device("round", 1e3, 1e2, 1e1)


def program_of(loss, params, batch, **options):
    setting = Setting(**options)
    state = setting.state(params, zf.make_mesh({"data": 1}))
    return zf.jit(setting.step(loss)).lower(state, batch)


def by_hand(target, *shapes, groups=(("g", "data", 4),)):
    """A program of one call on inputs of these shapes."""
    mode = torch._subclasses.FakeTensorMode()
    graph = Graph()
    inputs = []
    for i, shape in enumerate(shapes):
        inputs.append(graph.placeholder(f"x{i}"))
        inputs[-1].meta["val"] = mode.from_tensor(torch.ones(shape))
    graph.output([ir.emit(graph, target, *inputs)])
    paths = tuple(f"batch/{i}" for i in range(len(inputs)))
    return zf.Program(graph, paths, ("params",), (), groups, "cpu")


# --- flops -------------------------------------------------------------------------


def test_an_mlp_by_hand():
    width, layers = 32, 4
    found = program_of(mlp, mlp_params(width, layers), normal(BATCH, width))
    product = 2 * BATCH * width * width
    analysis = found.cost_analysis()
    assert analysis.forward.flops == layers * product
    # By the weight for each, by the input for all but the first.
    assert analysis.backward.flops == (2 * layers - 1) * product
    assert analysis.rest.flops == 0


def test_a_gpt_by_hand():
    length, width, heads = 16, CONFIG.d_model, CONFIG.n_heads
    found = program_of(functools.partial(gpt.loss, config=CONFIG), *model("gpt")[1:])
    kv_width = CONFIG.n_kv_heads * CONFIG.head_dim
    weights = CONFIG.n_layers * (
        2 * width * width + 2 * width * kv_width + 3 * width * CONFIG.d_ff
    )
    weights += CONFIG.vocab_size * width  # the head
    products = 2 * BATCH * length * weights
    attention = 4 * BATCH * heads * length * length * CONFIG.head_dim * CONFIG.n_layers
    analysis = found.cost_analysis()
    assert analysis.forward.flops == products + attention
    assert analysis.backward.flops == 2 * products + attention * 5 // 2
    # The convention of gpt.flops_per_token, which does not count that the backward of
    # attention computes the probabilities again.
    per_token = gpt.flops_per_token(CONFIG, length)
    assert analysis.total.flops == per_token * BATCH * length + attention // 2


@pytest.mark.parametrize("name", ["mlp", "conv", "classifier"])
def test_torch_counts_the_same_on_the_eager_step(name):
    loss, params, batch = model(name)
    setting = Setting(zero=3)
    state = setting.state(params, zf.make_mesh({"data": 1}))
    with FlopCounterMode(display=False) as counter:
        setting.step(loss)(state, batch)
    found = program_of(loss, params, batch).cost_analysis().total.flops
    assert found == counter.get_total_flops() > 0


def test_torch_counts_the_same_but_attention_on_cpu():
    loss, params, batch = model("gpt")
    setting = Setting(zero=0)
    state = setting.state(params, zf.make_mesh({"data": 1}))
    with FlopCounterMode(display=False) as counter:
        setting.step(loss)(state, batch)
    attention = 4 * BATCH * CONFIG.n_heads * 16 * 16 * CONFIG.head_dim
    attention *= CONFIG.n_layers
    found = program_of(loss, params, batch).cost_analysis().total.flops
    assert found - counter.get_total_flops() == attention * 7 // 2


def test_attention_as_torch_counts_it_on_gpus():
    q, k = torch.Size((2, 4, 16, 8)), torch.Size((2, 4, 12, 8))
    formulas = torch.utils.flop_counter
    forward = by_hand(aten._scaled_dot_product_flash_attention_for_cpu.default, q, k, k)
    assert forward.cost_analysis().total.flops == formulas.sdpa_flop_count(q, k, k)


def test_microbatches_and_precision_leave_the_flops():
    once = program_of(mlp, mlp_params(), normal(BATCH, 32)).cost_analysis()
    for options in ({"microbatches": 4}, {"precision": "bf16"}, {"zero": 0}):
        other = program_of(mlp, mlp_params(), normal(BATCH, 32), **options)
        assert other.cost_analysis().total.flops == once.total.flops, options


def test_remat_costs_a_forward_in_the_backward():
    loss, params, batch = model("gpt")
    plain = program_of(loss, params, batch).cost_analysis()
    again = program_of(*model("gpt_remat")).cost_analysis()
    assert again.forward.flops == plain.forward.flops
    head = 2 * BATCH * 16 * CONFIG.vocab_size * CONFIG.d_model
    # A block's last product is not computed again where its result is not needed.
    most = plain.forward.flops - head
    assert 0.7 * most < again.backward.flops - plain.backward.flops <= most


def test_a_target_may_count_for_itself():
    class Counted:
        __name__ = "counted"

        def __call__(self, x):
            return x * 2

        def flops(self, x):
            return 7 * x.numel()

    assert by_hand(Counted(), (3, 4)).cost_analysis().total.flops == 84
    assert by_hand(lambda x: x * 2, (3, 4)).cost_analysis().total.flops == 0


# --- bytes and seconds -------------------------------------------------------------


def test_bytes_of_a_product():
    found = by_hand(aten.mm.default, (4, 8), (8, 2)).cost_analysis(ROUND)
    assert found.total.moved_bytes == 4 * (4 * 8 + 8 * 2 + 4 * 2)
    assert found.total.flops == 2 * 4 * 8 * 2
    assert found.total.compute_s == pytest.approx(4 * 56 / 1e2)  # bound by memory
    fast = dataclasses.replace(ROUND, memory_bytes_per_s=1e9)
    found = by_hand(aten.mm.default, (4, 8), (8, 2)).cost_analysis(fast)
    assert found.total.compute_s == pytest.approx(128 / 1e3)  # bound by arithmetic


def test_an_expanded_tensor_is_read_once():
    def expanded(x):
        return x.expand(100, 4)

    program = by_hand(expanded, (1, 4))
    (call,) = ir.calls_of(program.graph)
    with program.graph.inserting_after(call):
        total = ir.emit(program.graph, aten.neg.default, call)
    assert cost.moved_bytes(total) == 4 * 4 + 4 * 400


@pytest.mark.parametrize("target", [aten.t.default, aten.alias.default])
def test_views_move_nothing(target):
    assert by_hand(target, (4, 8)).cost_analysis().total == cost.Cost()


def test_a_loop_counts_as_often_as_it_runs_and_adds_up():
    body = by_hand(aten.neg.default, (4,)).graph
    once = by_hand(aten.neg.default, (4,)).cost_analysis().total
    loop = by_hand(SumOver(body, 3, 0), (4,)).cost_analysis().total
    assert loop.moved_bytes == 3 * once.moved_bytes + 2 * 3 * 16


def test_what_is_sent_takes_the_wire():
    setting, x = Setting(zero=3), normal(4, 32)
    again = [p for p in DEFAULT if p.__name__ != "keep_small"]
    program = abstract_program(mlp, mlp_params(), x, setting, 4, passes=again)
    found = program.cost_analysis(ROUND)
    assert found.total.sent_bytes == program.comm_analysis().total_bytes
    assert found.total.comm_s == pytest.approx(found.total.sent_bytes / 1e1)
    total = found.total
    assert total.serial_s == total.compute_s + total.comm_s
    assert total.overlapped_s == max(total.compute_s, total.comm_s)
    assert found.forward.sent_bytes > 0
    assert found.backward.sent_bytes > found.forward.sent_bytes


def test_the_total_is_the_sum_of_the_phases():
    found = program_of(mlp, mlp_params(), normal(BATCH, 32), clip=True).cost_analysis()
    for field in dataclasses.fields(cost.Cost):
        parts = [getattr(c, field.name) for c in (found.forward, found.backward)]
        whole = getattr(found.total, field.name)
        rest = getattr(found.rest, field.name)
        assert whole == pytest.approx(sum(parts) + rest), field.name
    assert found.rest.moved_bytes > 0


def test_the_device_is_the_programs_unless_said():
    program = by_hand(aten.mm.default, (4, 8), (8, 2))
    assert program.cost_analysis().device == cost.CPU
    on_gpu = dataclasses.replace(program, device_type="cuda")
    assert on_gpu.cost_analysis().device == cost.H100_SXM
    assert on_gpu.cost_analysis(cost.A100_SXM).device == cost.DEVICES["a100"]


def test_a_table_for_people():
    lines = str(program_of(mlp, mlp_params(), normal(BATCH, 32)).cost_analysis())
    head, names, *rows = lines.splitlines()
    assert head == "on CPU core"
    assert names.split()[:3] == ["flops", "moved", "sent"]
    first = [row.split()[0] for row in rows]
    assert first == ["forward", "backward", "rest", "total"]
