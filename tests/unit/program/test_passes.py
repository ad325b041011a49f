# SPDX-License-Identifier: Apache-2.0
"""What each pass changes in a program; that it changes no bit is law L15."""

import pytest
import torch

import zfunc as zf
from tests.unit.program.programs import Setting, abstract_program, mlp, mlp_params
from zfunc.program import ir, passes
from zfunc.program.passes.chains import wait_of
from zfunc.program.passes.keep_gathered import keep_gathered

LAYERS = 4


def program(chosen, zero=3, num_ranks=4, batch=64, **setting):
    x = torch.zeros(batch, 32)
    params = mlp_params(layers=LAYERS)
    options = Setting(zero=zero, **setting)
    return abstract_program(mlp, params, x, options, num_ranks, passes=chosen)


def sends(one, target):
    graphs = ir.with_bodies(one.graph)
    return [n for g in graphs for n in ir.calls_of(g) if n.target is target]


def phases(one, target=ir.ALL_GATHER):
    return [ir.phase(n) for n in sends(one, target)]


def peak(one):
    return one.memory_analysis().peak_bytes


# --- simplify ----------------------------------------------------------------------


def test_simplify_leaves_fewer_nodes_and_what_is_sent():
    traced, simple = program(()), program((passes.simplify,))
    assert len(simple.graph.nodes) < 0.8 * len(traced.graph.nodes)
    assert simple.comm_analysis() == traced.comm_analysis()
    assert peak(simple) <= peak(traced)


def test_simplify_does_not_undo_remat():
    """Equal large values may be the two ends of a recomputation."""
    from zfunc.program.passes.simplify import SHARED_BYTES

    def loss(p, x):
        a = torch.tanh(x) * p["w"]
        return (a + torch.tanh(x)).sum()

    for rows, count in ((SHARED_BYTES, 2), (2, 1)):
        x, w = torch.zeros(rows, 4), {"w": torch.zeros(4)}
        made = abstract_program(
            loss, w, x, Setting(zero=0), 1, passes=(passes.simplify,)
        )
        assert len(sends(made, torch.ops.aten.tanh.default)) == count


# --- gathers -----------------------------------------------------------------------


@pytest.mark.parametrize("microbatches", [1, 2])
def test_regather_gathers_every_weight_twice_at_stage_3_only(microbatches):
    chosen = (passes.regather,)
    at_3 = phases(program(chosen, microbatches=microbatches))
    assert at_3.count("forward") == 2 * LAYERS
    # Biases and the first weight are not needed for the backward.
    assert at_3.count("backward") == LAYERS - 1
    for zero in (1, 2):
        assert phases(program(chosen, zero=zero)) == [""] * 2 * LAYERS


def test_regather_lowers_the_peak():
    kept, again = program((passes.sink,)), program((passes.sink, passes.regather))
    kept_bytes, again_bytes = (p.memory_analysis().peak.bytes for p in (kept, again))
    assert kept_bytes.gathered >= (LAYERS - 1) * 32 * 32 * 4
    assert again_bytes.gathered <= 32 * 32 * 4 + 32 * 4
    assert sum(again_bytes) < sum(kept_bytes)


def test_sink_gathers_where_the_weight_is_used():
    """Stages 1 and 2 gather all weights first; sunk, they come one by one."""
    for chosen, together in (((), True), ((passes.sink,), False)):
        one = program(chosen, zero=1)
        order = list(one.graph.nodes)
        starts = [order.index(n) for n in sends(one, ir.ALL_GATHER)]
        first_product = order.index(sends(one, torch.ops.aten.mm.default)[0])
        assert (max(starts) < first_product) is together


def test_cast_before_gather_halves_what_is_gathered():
    chosen = (passes.simplify, passes.cast_before_gather)
    for microbatches in (1, 2):
        setting = {"zero": 1, "precision": "bf16", "microbatches": microbatches}
        before, after = (program(p, **setting) for p in (chosen[:1], chosen))
        for one, dtype in ((before, torch.float32), (after, torch.bfloat16)):
            gathered = {n.meta["val"].dtype for n in sends(one, ir.ALL_GATHER)}
            assert gathered == {dtype}
        scattered = {n.meta["val"].dtype for n in sends(after, ir.REDUCE_SCATTER)}
        assert scattered == {torch.float32}


def test_a_weight_that_is_also_used_in_full_is_gathered_in_full():
    def loss(p, x):
        return (x.bfloat16() @ p["w"].bfloat16()).float().sum() + p["w"].sum()

    chosen = (passes.simplify, passes.cast_before_gather)
    made = abstract_program(
        loss,
        {"w": torch.zeros(8, 8)},
        torch.zeros(4, 8),
        Setting(zero=1),
        4,
        passes=chosen,
    )
    assert {n.meta["val"].dtype for n in sends(made, ir.ALL_GATHER)} == {torch.float32}


# --- keep_gathered -------------------------------------------------------------------

BASE = (passes.simplify, passes.sink, passes.regather, passes.scatter_early)


def kept(limit_bytes, **setting):
    return program((*BASE, keep_gathered(memory_limit_bytes=limit_bytes)), **setting)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_memory_buys_messages(microbatches):
    setting = {"microbatches": microbatches}
    base, full = program(BASE, **setting), kept(2**40, **setting)
    assert kept(0, **setting).comm_analysis() == base.comm_analysis()
    assert phases(full).count("backward") == 0
    assert phases(full).count("forward") == 2 * LAYERS
    sent = [p.comm_analysis().total_bytes for p in (base, full)]
    assert sent[1] < sent[0]


def test_the_limit_is_kept_and_used():
    base, full = peak(program(BASE)), peak(kept(2**40))
    assert base < full
    counts = []
    for part in (0.0, 0.4, 0.7, 1.0):
        limit_bytes = int(base + part * (full - base))
        one = kept(limit_bytes)
        assert peak(one) <= limit_bytes
        counts.append(phases(one).count("backward"))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[-1] == 0


@pytest.mark.parametrize("limit", [-1, True, 1.5, None])
def test_a_limit_is_a_count_of_bytes(limit):
    with pytest.raises(ValueError, match="memory_limit_bytes is a count"):
        keep_gathered(memory_limit_bytes=limit)


# --- reductions ----------------------------------------------------------------------


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_scatter_early_reduces_during_the_backward(zero):
    target = ir.REDUCE_SCATTER if zero else ir.ALL_REDUCE
    for chosen, early in (((), False), ((passes.scatter_early,), True)):
        one = program(chosen, zero=zero)
        order = list(one.graph.nodes)
        sizes = {n: ir.val_bytes(n) for n in sends(one, target)}
        starts = [order.index(n) for n in sizes if sizes[n] > 8]  # not the metrics
        last_product = order.index(sends(one, torch.ops.aten.mm.default)[-1])
        assert (min(starts) < last_product) is early
        # At most those of the layer whose gradient is the last.
        assert (sum(s > last_product for s in starts) <= 2) is early


def test_few_reductions_are_under_way_at_a_time():
    early = (passes.simplify, passes.scatter_early)
    for in_flight in (0, 1, 2):
        one = program((*early, passes.prefetch(gathers=0, scatters=in_flight)), zero=2)
        order = list(one.graph.nodes)
        starts = sends(one, ir.REDUCE_SCATTER)
        for i, start in enumerate(starts):
            done = order.index(wait_of(start))
            others = sum(order.index(s) < done for s in starts[i + 1 :])
            assert others <= max(in_flight - 1, 0)
            if i + in_flight < len(starts):
                assert others == max(in_flight - 1, 0)


# --- buckets and prefetch -----------------------------------------------------------


def test_a_bucket_never_mixes_forward_and_backward():
    one = program((*BASE, passes.bucket()))
    assert sorted(phases(one)) == ["backward", "forward"]


def test_buckets_send_the_same_bytes_in_fewer_messages():
    base = program(BASE).comm_analysis()
    counts = []
    for bucket_bytes in (1, 5000, 10_000, 2**30):
        one = program((*BASE, passes.bucket(bucket_bytes=bucket_bytes)))
        assert one.comm_analysis().total_bytes == base.total_bytes
        counts.append(one.comm_analysis().total_count)
    assert counts[0] == base.total_count
    assert counts == sorted(counts, reverse=True)
    assert counts[1] > counts[2] > counts[3]


def test_no_bucket_is_larger_than_its_limit():
    one = program((*BASE, passes.bucket(bucket_bytes=9000)))
    sizes = [ir.val_bytes(n) for n in sends(one, ir.ALL_GATHER)]
    assert max(sizes) <= 9000
    assert len(sizes) < 2 * LAYERS


def test_large_tensors_travel_alone():
    chosen = (*BASE, passes.bucket(alone_bytes=4096))
    sizes = [ir.val_bytes(n) for n in sends(program(chosen), ir.ALL_GATHER)]
    assert sizes.count(4096) == LAYERS + LAYERS - 1  # the matrices, both ways
    assert sizes.count(LAYERS * 32 * 4) == 1  # the biases, together


def test_prefetch_starts_gathers_ahead():
    early = (*BASE, passes.bucket(bucket_bytes=1))
    for ahead in (0, 1, 3):
        one = program((*early, passes.prefetch(gathers=ahead, scatters=0)))
        order = list(one.graph.nodes)
        starts = sends(one, ir.ALL_GATHER)
        waits = [order.index(wait_of(s)) for s in starts]
        for i, start in enumerate(starts[ahead:], ahead):
            begun = sum(w > order.index(start) for w in waits[: i + 1]) - 1
            assert begun == ahead


@pytest.mark.parametrize(
    "make",
    [
        lambda: passes.prefetch(gathers=-1),
        lambda: passes.prefetch(scatters=1.5),
        lambda: passes.prefetch(gathers=True),
        lambda: passes.bucket(bucket_bytes=0),
        lambda: passes.bucket(alone_bytes=-4),
        lambda: passes.bucket(bucket_bytes=True),
    ],
)
def test_options_are_checked(make):
    with pytest.raises(ValueError, match=r"is a (positive number|count); got"):
        make()


# --- the form on gloo ----------------------------------------------------------------


def test_an_abstract_mesh_keeps_the_plain_form():
    assert sends(program(passes.DEFAULT), ir.REDUCE_SCATTER)
    assert not sends(program(passes.DEFAULT), ir.ALL_TO_ALL)


def test_shared_reads_take_no_time():
    """Written out, the value of x + x sixty times over has 2 ** 60 terms."""

    def loss(p, b):
        x = p
        for _ in range(60):
            x = x + x
        return (x * b).sum() * 2.0**-60

    mesh = zf.AbstractMesh({"data": 2})
    step = zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=3))
    params, batch = zf.abstract((torch.ones(4), torch.ones(2, 4)))
    program = zf.jit(step, passes=()).lower(zf.shard(params, mesh), batch)
    for change in (passes.simplify, passes.regather, passes.keep_small()):
        program = change(program)
