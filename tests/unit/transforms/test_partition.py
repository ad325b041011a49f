# SPDX-License-Identifier: Apache-2.0
"""``partition``: what each stage sends, its options, where gradients end up."""

import itertools

import pytest
import torch

import zfunc as zf
from tests.unit.core.common import (
    F64,
    STAGES,
    alone,
    assert_bitwise,
    assert_same_gradient,
    example_batch,
    example_params,
    on_mesh,
    one_rank,
    randn,
    reference,
    spec_of,
    traffic,
)
from zfunc.core.errors import MeshError, PlacementError
from zfunc.core.tree import tree_structure
from zfunc.testing import simulate, split_batch

BF16, F32 = torch.bfloat16, torch.float32
RANKS = 4
WIDTH = 64
SCALARS_BYTES = 64  # the loss, its weight and the norm of the gradient travel too


def layers(width=WIDTH, dtype=F32):
    """Large, small and tiny leaves, all of which divide."""
    return {
        "b": torch.ones(width, dtype=dtype),
        "w1": torch.ones(width, width, dtype=dtype),
        "w2": torch.ones(width, width, dtype=dtype),
    }


def network(params, x, how=lambda block: block):
    first = how(lambda w, x: torch.tanh(x @ w))
    second = how(lambda w, b, x: torch.tanh(x @ w) + b)
    return second(params["w2"], params["b"], first(params["w1"], x)).square().mean()


def checkpointed(params, x):
    return network(params, x, zf.remat)


def loss(params, batch):
    y = torch.tanh(batch["x"] @ params["w"] + params["b"])
    return (y - batch["y"]).square().mean() + 0.1 * params["v"].square().mean()


def messages(loss_fn, *transforms, zero, params=None, samples=8, **options):
    """The collectives of one step of one of RANKS ranks, on shapes alone."""
    mesh = zf.AbstractMesh({"data": RANKS})
    params = params or layers()

    def program(params, x):
        where = zf.partition(zero=zero, **options)
        step = zf.train_step(loss_fn, zf.optim.sgd(0.1), where, *transforms)
        step(zf.shard(params, mesh, spec=spec_of(zero)), x)

    return traffic(program, params, torch.ones(samples, WIDTH))


def sent_bytes(found):
    """What a rank sends with ring algorithms: (n - 1) / n of the whole, or twice it."""
    share = (RANKS - 1) / RANKS
    factors = {
        "all_gather_into_tensor": lambda m: m.received * share,
        "reduce_scatter_tensor": lambda m: m.sent * share,
        "all_reduce": lambda m: 2 * m.sent * share,
    }
    return sum(factors[m.name](m) for m in found)


def volume(found, params=None):
    """Bytes sent, in units of the parameters' (times (n - 1) / n)."""
    psi = sum(x.nbytes for x in (params or layers()).values())
    return sent_bytes(found) / (psi * (RANKS - 1) / RANKS)


def count(found, name):
    return sum(1 for m in found if m.name == name and m.sent > 16)


# --- the table of volumes -----------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "loss_fn", "num_microbatches", "expected"),
    [
        (0, network, 1, 2),
        (1, network, 1, 2),
        (2, network, 1, 2),
        (3, network, 1, 2),
        (3, checkpointed, 1, 3),
        (0, network, 4, 2),
        (1, network, 4, 2),
        (2, network, 4, 1 + 4),
        (3, network, 4, 4 * 2),
        (3, checkpointed, 4, 4 * 3),
        (1, checkpointed, 1, 2),
    ],
)
def test_the_volume_of_a_step(zero, loss_fn, num_microbatches, expected):
    found = messages(loss_fn, zf.accumulate(num_microbatches), zero=zero)
    psi = sum(x.nbytes for x in layers().values())
    assert expected <= volume(found) <= expected + SCALARS_BYTES / psi


@pytest.mark.parametrize(
    ("zero", "gathers", "scatters", "reductions"),
    [(0, 0, 0, 1), (1, 1, 1, 0), (2, 1, 1, 0), (3, 3, 3, 0)],
)
def test_the_messages_of_a_step(zero, gathers, scatters, reductions):
    """Small leaves share one; at stage 3 there is one for each use."""
    found = messages(network, zero=zero)
    assert count(found, "all_gather_into_tensor") == gathers
    assert count(found, "reduce_scatter_tensor") == scatters
    assert count(found, "all_reduce") == reductions


def test_a_parameter_that_is_not_used_sends_nothing_at_stage_3():
    def partial(params, x):
        return (x @ params["w1"]).sum()

    found = messages(partial, zero=3)
    assert count(found, "all_gather_into_tensor") == 1
    assert count(found, "reduce_scatter_tensor") == 1


def test_a_parameter_that_is_used_twice_is_gathered_once():
    def twice(params, x):
        return (x @ params["w1"] @ params["w1"]).sum()

    found = messages(twice, zero=3)
    assert count(found, "all_gather_into_tensor") == 1
    assert count(found, "reduce_scatter_tensor") == 1


def test_the_number_of_messages_does_not_depend_on_the_optimizer_state():
    for zero in (1, 2, 3):
        assert len(messages(network, zero=zero)) <= 3 + 3 + 2


def test_one_rank_sends_nothing():
    mesh = zf.AbstractMesh({"data": 1})

    def program(params, x):
        step = zf.train_step(network, zf.optim.sgd(0.1), zf.partition(zero=3))
        step(zf.shard(params, mesh), x)

    assert traffic(program, layers(), torch.ones(2, WIDTH)) == []


# --- persistence_threshold ----------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "gathered_first"), [(0, 0), (WIDTH - 1, 0), (WIDTH, 1), (WIDTH**2, 3)]
)
def test_small_leaves_are_gathered_once_per_step(threshold, gathered_first):
    """With m microbatches a leaf at use is gathered m times, one below once."""
    found = messages(network, zf.accumulate(4), zero=3, persistence_threshold=threshold)
    gathers = [m for m in found if m.name == "all_gather_into_tensor"]
    once = 1 if gathered_first else 0  # they share a message
    assert len(gathers) == 4 * (3 - gathered_first) + once


@pytest.mark.parametrize("threshold", [1, 4, 20, 10**6])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_threshold_changes_no_bit(threshold, ranks):
    def run(**options):
        where = zf.partition(zero=3, **options)
        step = zf.train_step(loss, zf.optim.adam(0.1), where)
        sim = simulate(step, {"data": ranks})
        state = sim.shard(example_params())
        return sim(state, split_batch(example_batch(), {"data": ranks}))

    got, want = run(persistence_threshold=threshold), run()
    assert tree_structure(got) == tree_structure(want)
    assert_bitwise(got, want)


# --- dtypes on the wire -------------------------------------------------------


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gathers_send_gather_dtype(zero):
    found = messages(network, zero=zero, gather_dtype=BF16)
    gathers = [m for m in found if m.name == "all_gather_into_tensor"]
    scatters = [m for m in found if m.name == "reduce_scatter_tensor"]
    assert {m.dtype for m in gathers} == {BF16}
    assert {m.dtype for m in scatters} == {F32}
    assert 1.5 <= volume(found) < 1.51


@pytest.mark.parametrize("zero", STAGES)
def test_reductions_send_reduce_dtype(zero):
    found = messages(network, zero=zero, reduce_dtype=BF16)
    large = [m for m in found if m.sent > 16]
    reductions = [m for m in large if m.name != "all_gather_into_tensor"]
    gathers = [m for m in large if m.name == "all_gather_into_tensor"]
    assert {m.dtype for m in reductions} == {BF16}
    assert {m.dtype for m in gathers} <= {F32}


@pytest.mark.parametrize("zero", [1, 3])
def test_the_default_is_the_storage_dtype(zero):
    params = layers(dtype=BF16)

    def narrow(params, x):
        return network(params, x.bfloat16()).float()

    found = messages(narrow, zero=zero, params=params)
    assert {m.dtype for m in found if m.sent > 16} == {BF16}
    assert volume(found, params) < 2.01


def test_at_stage_3_a_policy_narrows_what_is_gathered():
    def narrow(params, x):
        return network(params, x)

    found = messages(narrow, zf.precision("bf16"), zero=3)
    gathers = [m for m in found if m.name == "all_gather_into_tensor"]
    assert {m.dtype for m in gathers} == {BF16}
    assert 1.5 <= volume(found) < 1.51
    wide = messages(narrow, zf.precision("bf16"), zero=3, gather_dtype=F32)
    assert 2.0 <= volume(wide) < 2.01


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_sees_what_was_sent(zero, ranks):
    params, batch = example_params(), example_batch()

    def run(loss_fn, params, **options):
        where = zf.partition(zero=zero, **options)
        sim = simulate(
            zf.train_step(loss_fn, zf.optim.sgd(0.1), where), {"data": ranks}
        )
        return sim.unshard(sim(sim.shard(params), split_batch(batch, {"data": ranks})))

    got = run(loss, params, gather_dtype=BF16)
    want = run(loss, zf.tree_map(lambda x: x.to(BF16).to(F64), params))
    assert_bitwise(got.metrics.loss, want.metrics.loss)
    assert_bitwise(got.grads, want.grads)
    assert all(g.dtype == F64 for g in got.grads.values())


@pytest.mark.parametrize("zero", STAGES)
def test_narrow_reductions_are_close_and_wide_inside(zero):
    """Rounded before they are sent and after they are summed, not in between."""
    params = {"w": torch.ones(4)}
    batch = torch.tensor([256.0, 1.0, 1.0, 1.0])
    where = zf.partition(zero=zero, reduce_dtype=BF16)
    step = zf.train_step(lambda p, b: (p["w"] * b).sum(), zf.optim.sgd(1.0), where)
    sim = simulate(step, {"data": 4})
    state = sim(sim.shard(params, spec=spec_of(zero)), batch.reshape(4, 1))
    total = torch.tensor(259.0).to(BF16).float()  # 256 when added up in bfloat16
    assert_bitwise(sim.unshard(state).grads["w"], (total / 4).expand(4).contiguous())


@pytest.mark.parametrize("zero", STAGES)
def test_gradients_have_the_dtype_of_the_state(zero):
    params = {"a": randn(4, 3), "b": randn(5, dtype=BF16), "c": randn(2, dtype=F32)}

    def mixed(p, b):
        return sum(x.double().square().sum() for x in p.values()) * b.mean()

    for ranks, microbatches in itertools.product((1, 2), (1, 2)):
        got = on_mesh(
            mixed,
            params,
            randn(4),
            zf.accumulate(microbatches),
            zero=zero,
            ranks=ranks,
        )
        assert {k: g.dtype for k, g in got.grads.items()} == {
            k: x.dtype for k, x in params.items()
        }


# --- edge cases ---------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("zero", STAGES)
def test_leaves_of_every_shape(zero, ranks):
    params = {
        "scalar": randn(),
        "one": randn(1, seed=1),
        "none": torch.ones(0, 3, dtype=F64),
        "thin": randn(7, 0, seed=2),
        "odd": randn(7, 3, seed=3),
        "empty subtree": None,
        "strided": randn(4, 6, seed=4).T[::2],
        "deep": [(randn(2, 2, 2, seed=5),)],
    }

    def total(p, x):
        return sum((q * (1 + x.mean())).sin().sum() for q in zf.tree_leaves(p))

    batch = randn(10, 2, seed=9)
    got = on_mesh(
        lambda p, x: sum((q.sum() * x.sum(1).mean()) for q in zf.tree_leaves(p)),
        params,
        batch,
        zero=zero,
        ranks=ranks,
    )
    want = reference(
        lambda p, x: sum((q.sum() * x.sum(1).mean()) for q in zf.tree_leaves(p)),
        params,
        batch,
    )
    assert_same_gradient(got, want)
    assert tree_structure(got.params) == tree_structure(params)
    if ranks == 1:
        got = on_mesh(total, params, batch, zero=zero)
        assert_same_gradient(got, reference(total, params, batch))


@pytest.mark.parametrize("zero", STAGES)
def test_parameters_that_share_memory_are_trained_apart(zero):
    w = randn(4, 3)
    params = {"a": w, "b": w, "c": w.T}

    def product(p, x):
        return ((x @ p["a"]) * (x @ p["b"])).mean() + p["c"].square().mean()

    batch = randn(6, 4, seed=1)
    got = on_mesh(product, params, batch, zero=zero, ranks=2)
    assert_same_gradient(got, reference(product, params, batch))
    assert_bitwise(params["a"], w)


@pytest.mark.parametrize("axes", [("data", "tensor"), ("tensor", "data")])
@pytest.mark.parametrize("zero", STAGES)
def test_another_axis_is_replication(zero, axes):
    shape = dict.fromkeys(axes, 2)
    step = zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=zero))
    sim = simulate(step, shape)
    state = sim.shard(example_params(), spec=spec_of(zero))
    views = sim.unshard_all(sim(state, split_batch(example_batch(), shape)))
    want = reference(loss, example_params(), example_batch())
    for view in views:
        assert_same_gradient(view, want)


def test_an_axis_of_another_name():
    step = zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=3, axis="dp"))
    sim = simulate(step, {"dp": 2})
    state = sim.shard(example_params(), spec=zf.P("dp"))
    got = sim.unshard(sim(state, split_batch(example_batch(), {"dp": 2}, "dp")))
    assert_same_gradient(got, reference(loss, example_params(), example_batch()))


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_leaves_may_be_sharded_over_other_dims_or_not_at_all(zero):
    specs = {"b": zf.P(), "v": zf.P(None, "data"), "w": zf.P("data")}
    step = zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=zero))
    sim = simulate(step, {"data": 2})
    state = sim.shard(example_params(), spec=specs)
    after = sim(state, split_batch(example_batch(), {"data": 2}))
    assert tree_structure(after.params) == tree_structure(state.params)
    want = reference(loss, example_params(), example_batch())
    assert_same_gradient(sim.unshard(after), want)


# --- misuse -------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), list(itertools.product(STAGES, STAGES)))
def test_a_step_has_one_partition(first, second):
    step = zf.train_step(
        loss, zf.optim.sgd(0.1), zf.partition(zero=first), zf.partition(zero=second)
    )
    spec = zf.P() if 0 in (first, second) else None
    with pytest.raises(PlacementError, match="one partition only"):
        step(zf.shard(example_params(), one_rank(), spec=spec), example_batch())


@pytest.mark.parametrize("zero", STAGES)
def test_a_state_without_that_axis(zero):
    step = zf.train_step(loss, zf.optim.sgd(0.1), zf.partition(zero=zero, axis="dp"))
    for mesh in (alone(), one_rank()):
        with pytest.raises(MeshError, match="axis 'dp' is not an axis of the mesh"):
            step(zf.shard(example_params(), mesh), example_batch())


@pytest.mark.parametrize(
    "options",
    [
        {"zero": 4},
        {"zero": -1},
        {"zero": True},
        {"zero": "3"},
        {"zero": 1.0},
        {"zero": None},
        {"zero": 1, "gather_dtype": "bf16"},
        {"zero": 1, "gather_dtype": torch.int8},
        {"zero": 1, "reduce_dtype": torch.int64},
        {"zero": 1, "reduce_dtype": torch.complex64},
        {"zero": 0, "gather_dtype": torch.bfloat16},
        {"zero": 3, "persistence_threshold": -1},
        {"zero": 3, "persistence_threshold": 1e5},
        {"zero": 3, "persistence_threshold": True},
        {"zero": 1, "persistence_threshold": 10},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(ValueError, match="partition: "):
        zf.partition(**options)


@pytest.mark.parametrize("axis", [0, None, ("data",), "da ta"])
def test_an_axis_is_a_name(axis):
    with pytest.raises((ValueError, TypeError), match="axis"):
        zf.partition(zero=1, axis=axis)
