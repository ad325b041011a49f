# SPDX-License-Identifier: Apache-2.0
"""The inductor backend: where programs are cut, and that the cuts change nothing.

Most tests run the pieces by the aten backend: then the bits are those of the program
that is not cut, and nothing has to be compiled. The last ones compile.
"""

import dataclasses
import functools
import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zfunc as zf
from tests.unit.core.test_autodiff import Wrong
from tests.unit.program import programs
from zfunc.core.tree import tree_leaves
from zfunc.models import gpt
from zfunc.program import backends, ir
from zfunc.program.backends import aten, inductor, order, pieces, regions, unbatched
from zfunc.program.passes import DEFAULT


@pytest.fixture
def cut(monkeypatch):
    """Cut everything that repeats, and do not compile; the graphs of the pieces."""
    monkeypatch.setattr(regions, "MIN_RUN_CALLS", 8)
    monkeypatch.setattr(regions, "MIN_PIECE_CALLS", 4)
    graphs = []

    def not_compiled(graph):
        graphs.append(graph)
        return aten.compile_graph(graph)

    monkeypatch.setattr(inductor, "compiled_by_inductor", not_compiled)
    return graphs


def run_of(graph):
    """A graph as a function of tensors that the caller keeps."""
    run = inductor.compile_graph(graph)
    return lambda *args: run(list(args))


def traced(fn, *args):
    return torch.fx.experimental.proxy_tensor.make_fx(fn, tracing_mode="fake")(
        *args
    ).graph


def pieces_in(graph):
    return pieces.pieces_of(pieces.parts_of(unbatched.unbatched(graph)))


def num_distinct(found):
    return len({piece.key() for piece in found})


def assert_bitwise(got, want):
    got, want = tree_leaves(got), tree_leaves(want)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


# --- what repeats ----------------------------------------------------------------

LAYERS = st.lists(st.integers(0, 5), min_size=5, max_size=12)


@settings(max_examples=30)
@given(LAYERS, st.integers(20, 40), LAYERS, LAYERS)
def test_a_repeated_layer_is_found_between_other_calls(layer, count, before, behind):
    row = np.array([*before, *(10 + x for x in layer * count), *behind])
    (run,) = regions.repeated_runs(row)
    assert run.start >= len(before)
    assert run.stop <= len(before) + len(layer) * count
    assert len(layer) % run.period == 0
    assert run.period * run.count > len(layer) * (count - 2)
    repetition = row[run.start : run.start + run.period].tolist()
    covered = row[run.start : run.start + run.period * run.count].tolist()
    assert covered == repetition * run.count


@settings(max_examples=30)
@given(LAYERS, LAYERS)
def test_forward_and_backward_are_two_runs(forward, backward):
    row = [10 + x for x in forward] * 40 + [1] + [20 + x for x in backward] * 40
    first, second = regions.repeated_runs(np.array(row))
    assert first.stop <= 40 * len(forward) + 1
    assert second.start >= 40 * len(forward)


def test_what_does_not_repeat_is_not_cut():
    row = list(range(300))
    assert regions.repeated_runs(np.array(row)) == []
    assert list(regions.cuts(row, [[] for _ in row])) == []


def test_repetitions_begin_where_they_hand_on_least():
    # Of the six calls of a layer only the last is read by the next layer.
    reads = [[i - 1] if i else [] for i in range(6 * 60)]
    for i in range(0, 6 * 60, 6):
        reads[i + 5] = [i, i + 1, i + 2, i + 3, i + 4]
    row = regions.numbered([i % 6 for i in range(6 * 60)] + [0, 1, 2])
    reads += [[len(reads) - 1], [], []]
    places = list(regions.cuts(row, reads))
    assert places[0] == 0
    assert {b - a for a, b in itertools.pairwise(places)} == {48, 24}


@pytest.mark.parametrize("layers", [8, 12])
def test_a_deeper_model_has_no_more_distinct_pieces(layers):
    config = dataclasses.replace(programs.CONFIG, n_layers=layers)
    setting = programs.Setting(zero=0)

    loss = functools.partial(gpt.loss, config=config)
    program = programs.abstract_program(
        loss, gpt.init(config), programs.tokens(), setting, 1
    )
    found = pieces_in(program.graph)
    assert num_distinct(found) <= 14
    assert len(found) > 2 * layers


def test_other_strides_are_other_pieces(cut):
    def twice(a, b):
        for _ in range(12):
            a = torch.tanh(a) * 2 + 1
        for _ in range(12):
            b = torch.tanh(b) * 2 + 1
        return [a, b]

    a = torch.randn(4, 6)
    same = pieces_in(traced(twice, a, a.clone()))
    other = pieces_in(traced(twice, a, a.t().contiguous().t()))
    assert num_distinct(same) < num_distinct(other)
    graph = traced(twice, a, a.t().contiguous().t())
    args = (a, a.t().contiguous().t())
    assert_bitwise(run_of(graph)(*args), aten.compile_graph(graph)(list(args)))


def test_zeros_of_both_signs_are_told_apart():
    def shifted(x):
        return [torch.copysign(x * 0.0, x * -0.0) + 1, (x * 2) + 1]

    graph = traced(shifted, torch.ones(3))
    muls = [n for n in ir.calls_of(graph) if n.target is torch.ops.aten.mul.Tensor]
    tokens = {repr(pieces._token(n, lambda _: None)) for n in muls}
    assert len(tokens) == 3


# --- the optimizer -----------------------------------------------------------------


def test_updates_are_sorted_by_leaf_and_stay_behind_what_they_read():
    program = programs.abstract_program(
        programs.mlp,
        programs.mlp_params(8, 4),
        programs.normal(4, 8),
        programs.Setting(zero=0, clip=True),
        1,
        passes=(),
    )
    calls = [n for n in ir.calls_of(program.graph) if not ir.is_view(n)]

    def reads(node):
        return pieces.sources(node, calls_only=True)

    ordered = order.leaf_by_leaf(calls, reads, pieces.is_fixed)
    assert sorted(ordered) == calls
    place = {node: i for i, node in enumerate(ordered)}
    assert all(place[r] < place[n] for n in ordered for r in reads(n))
    shapes = [tuple(n.meta["val"].shape) for n in ordered if not ir.phase(n)]
    switches = sum(a != b for a, b in itertools.pairwise(shapes))
    unsorted = [tuple(n.meta["val"].shape) for n in calls if not ir.phase(n)]
    assert 3 * switches < sum(a != b for a, b in itertools.pairwise(unsorted))


def test_numbers_are_not_computed_with_the_leaves_that_read_them():
    program = programs.abstract_program(
        programs.mlp,
        programs.mlp_params(8, 4),
        programs.normal(4, 8),
        programs.Setting(zero=0),
        1,
    )
    for piece in pieces_in(program.graph):
        powers = [n for n in piece.body if n.target is torch.ops.aten.pow.Scalar]
        large = [n for n in piece.calls if not order.is_number(n)]
        behind = [n for n in large if n.target is torch.ops.aten.sqrt.default]
        assert not (powers and behind)


# --- cut, the bits stay --------------------------------------------------------------

CASES = [
    ("mlp", 1, True),
    ("mlp", 2, False),
    ("conv", 1, True),
    ("classifier", 1, False),
    ("gpt", 1, True),
    ("gpt_remat", 2, True),
]


def train(jitted, setting, params, batch, steps=3):
    state = setting.state(params, zf.make_mesh({"data": 1}))
    for _ in range(steps):
        state = jitted(state, batch)
    return state


@pytest.mark.parametrize(("name", "microbatches", "donate"), CASES)
def test_cut_programs_are_bitwise_the_same(cut, name, microbatches, donate):
    loss, params, batch = programs.model(name)
    setting = programs.Setting(3, microbatches, clip=name != "mlp")
    results = []
    for backend in ("aten", "inductor"):
        step = zf.jit(setting.step(loss), donate=donate, backend=backend)
        own = zf.tree_map(torch.clone, params)
        results.append(train(step, setting, own, batch))
    assert_bitwise(results[1], results[0])
    assert cut


@pytest.mark.parametrize("zero", [1, 3])
def test_cut_programs_send_the_same_on_three_ranks(cut, zero):
    loss, params, batch = programs.model("mlp")
    setting = programs.Setting(zero, 2)
    program = programs.abstract_program(loss, params, batch, setting, 3)
    found = pieces.parts_of(unbatched.unbatched(program.graph))
    sent = [n for n in found if isinstance(n, torch.fx.Node) and ir.is_collective(n)]
    main = [n for n in ir.calls_of(program.graph) if ir.is_collective(n)]
    assert [n.name for n in sent] == [n.name for n in main]


@pytest.mark.parametrize("passes", [(), DEFAULT[:3], DEFAULT], ids=len)
def test_after_any_passes(cut, passes):
    loss, params, batch = programs.model("mlp")
    setting = programs.Setting(3, 2, clip=True)
    results = []
    for backend in ("aten", "inductor"):
        step = zf.jit(setting.step(loss), backend=backend, passes=passes)
        own = zf.tree_map(torch.clone, params)
        results.append(train(step, setting, own, batch))
    assert_bitwise(results[1], results[0])


def test_views_of_inputs_and_of_each_other(cut):
    def several(x, y):
        a = torch.tanh(x) * y
        b = (a + 1) * 2
        c, d = b.split(2)
        return [x.t(), a, a.t(), b.view(-1), c + 1, d, y[0], d.t() * 2]

    x, y = torch.randn(4, 3), torch.randn(4, 3)
    graph = traced(several, x, y)
    got, want = run_of(graph)(x, y), aten.compile_graph(graph)([x, y])
    assert_bitwise(got, want)
    for i in (0, 2, 5, 6):
        assert got[i]._is_view() or got[i].untyped_storage().data_ptr() in {
            t.untyped_storage().data_ptr() for t in (x, y, got[1], got[3])
        }


def test_calls_that_write_are_left_in_their_place(cut):
    def writes(x):
        a = torch.tanh(x) * 2
        b = a.exp() + a
        a.add_(1)
        c = a.exp() * b
        return [a, b, c]

    x = torch.randn(5)
    graph = traced(writes, x)
    assert_bitwise(run_of(graph)(x), aten.compile_graph(graph)([x]))


def test_random_numbers_are_those_of_the_program_that_is_not_cut(cut):
    def noisy(x):
        for _ in range(3):
            x = torch.nn.functional.dropout(torch.tanh(x) * 2, 0.5) + 1
        return [x + torch.rand_like(x) * 2]

    x = torch.randn(64)
    graph = traced(noisy, x)
    torch.manual_seed(0)
    want = aten.compile_graph(graph)([x])
    torch.manual_seed(0)
    assert_bitwise(run_of(graph)(x), want)
    assert not any(n.target is torch.ops.aten.rand for g in cut for n in g.nodes)


def test_saved_activations_are_made_again_where_that_reads_nothing_new(monkeypatch):
    monkeypatch.setattr(regions, "MIN_RUN_CALLS", 8)
    monkeypatch.setattr(regions, "MIN_PIECE_CALLS", 4)

    def loss(params, x):
        for w in params:
            h = x @ w
            x = x + torch.nn.functional.silu(h) * h
        return x.square().mean()

    params = [programs.normal(32, 32, seed=i) for i in range(6)]
    program = programs.abstract_program(
        loss, params, programs.normal(16, 32), programs.Setting(zero=0), 1
    )
    found = pieces_in(program.graph)
    assert any(piece.remade for piece in found)
    silu = torch.ops.aten.silu.default
    handed_on = [n for piece in found for n in piece.inputs if n.target is silu]
    assert handed_on == []


def test_a_list_of_inputs_is_emptied_and_let_go_of(cut):
    graph = traced(lambda x: [(torch.tanh(x) * 2).sum()], torch.ones(3))
    args = [torch.ones(3)]
    inductor.compile_graph(graph)(args)
    assert args == []


# --- which backend -----------------------------------------------------------------


def test_the_default_is_the_devices():
    assert backends.choose(None, "cpu") is aten.compile_graph
    assert backends.choose("inductor", "cpu") is inductor.compile_graph


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="'xla'; there are aten, inductor, cudagraph"):
        backends.choose("xla", "cpu")


def test_a_graph_of_kernels_needs_a_gpu():
    with pytest.raises(ValueError, match="state is on a cpu: use backend='aten'"):
        backends.choose("cudagraph", "cpu")


def test_inductor_without_a_compiler():
    absent = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    install = r"no-such-compiler does not run: install g\+\+"
    with absent, pytest.raises(ValueError, match=install):
        backends.choose("inductor", "cpu")


def test_a_recording_holds_no_messages_and_no_cpu_tensors():
    graph = traced(lambda x: [x + 1], torch.ones(2))
    with pytest.raises(ValueError, match=r"x_1 f32\[2\] is on cpu: move the state"):
        backends.cudagraph.compile_graph(graph)
    program = programs.abstract_program(
        *programs.model("mlp"), programs.Setting(zero=3), 2
    )
    with pytest.raises(ValueError, match="sends to other ranks"):
        backends.cudagraph._check_no_messages(program.graph)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replayed_on_a_gpu():
    loss, params, batch = programs.model("mlp")
    params, batch = zf.tree_map(lambda x: x.cuda(), (params, batch))
    setting, mesh = programs.Setting(zero=0), zf.make_mesh({})
    runs = []
    for backend in ("aten", "inductor", "cudagraph"):
        step = zf.jit(setting.step(loss), backend=backend)
        state = setting.state(zf.tree_map(torch.clone, params), mesh)
        losses = []
        for _ in range(5):
            state = step(state, batch)
            losses.append(state.metrics.loss)
        runs.append(torch.stack(losses))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(runs[2], runs[1], rtol=1e-5, atol=0)


# --- compiled ------------------------------------------------------------------------


def test_compiled_losses_are_those_of_aten_over_ten_steps(caplog):
    config = dataclasses.replace(programs.CONFIG, n_layers=1)
    loss = functools.partial(gpt.loss, config=config)
    params, batch = gpt.init(config), programs.tokens()
    setting = programs.Setting(3, 2, clip=True)
    losses, states = [], []
    caplog.set_level(logging.INFO, "zfunc.inductor")
    for backend in ("aten", "inductor"):
        step = zf.jit(setting.step(loss), backend=backend)
        own = zf.tree_map(torch.clone, params)
        state = setting.state(own, zf.make_mesh({"data": 1}))
        losses.append([])
        for _ in range(10):
            state = step(state, batch)
            losses[-1].append(state.metrics.loss.item())
        states.append(state)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert "pieces, called" in caplog.text
    for a, b in zip(*map(tree_leaves, states), strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        if not a.dtype.is_floating_point:
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["aten", "inductor"])
def test_a_backward_that_is_wrong_on_purpose_is_honoured(backend):
    def loss(params, x):
        return (Wrong.apply(torch.tanh(params * x)) * 3).sum()

    params, x = torch.linspace(-1, 1, 8), torch.linspace(1, 2, 8)
    step = zf.train_step(loss, zf.optim.sgd(1.0))
    state = zf.jit(step, backend=backend)(zf.shard(params, zf.make_mesh({})), x)
    slope = 3 * x * (1 - torch.tanh(params * x) ** 2)
    torch.testing.assert_close(state.grads.buffer, 100 * slope)
    torch.testing.assert_close(state.params.buffer, params - 100 * slope)


def test_compiled_updates_are_written_in_place_except_over_what_is_held():
    params = {"a": programs.normal(64, 32), "b": programs.normal(64, 32, seed=1)}
    step = zf.jit(
        zf.train_step(
            lambda p, x: ((x @ p["a"]).tanh() * (x @ p["b"])).sum(),
            zf.optim.adamw(0.1),
        ),
        backend="inductor",
    )
    x = programs.normal(4, 64)
    state = step(zf.shard(params, zf.make_mesh({}), tx=zf.optim.adamw(0.1)), x)
    del params
    mine, held = state.params["a"].buffer, state.params["b"].buffer
    places = [mine.data_ptr(), held.data_ptr()]
    versions, before = mine._version, held.clone()
    del mine
    state = step(state, x)
    assert state.params["a"].buffer.data_ptr() == places[0]
    assert state.params["a"].buffer._version > versions
    assert state.params["b"].buffer.data_ptr() != places[1]
    assert torch.equal(held, before)


def test_integers_and_bools_are_exact():
    def counts(x, i):
        a = (i * 3 - 7) // 2 % 5
        return [a, a > 1, torch.where(a > 1, i, -i), (x > 0).sum(), x.argmax()]

    x, i = torch.randn(1000), torch.randint(-1000, 1000, (1000,))
    graph = traced(counts, x, i)
    assert_bitwise(run_of(graph)(x, i), aten.compile_graph(graph)([x, i]))


@pytest.mark.parametrize("wrap", [zf.optim.kahan, None], ids=["kahan", "ema"])
def test_what_is_rounded_off_is_known(wrap):
    """Inductor would leave the cast to bfloat16 and back out, and lose nothing."""
    sgd = zf.optim.sgd(1e-3)
    tx = wrap(sgd) if wrap else zf.optim.chain(sgd, zf.optim.ema(0.9))
    step = zf.train_step(lambda p, b: (p["w"] * b).sum(), tx)

    def trained(run):
        params = {"w": torch.ones(8, dtype=torch.bfloat16)}
        state = zf.shard(params, zf.make_mesh({}), tx=tx)
        for _ in range(30):
            state = run(state, torch.ones(8, dtype=torch.bfloat16))
        return zf.tree_leaves((state.params, state.moments))

    pairs = zip(trained(zf.jit(step, backend="inductor")), trained(step), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
