# SPDX-License-Identifier: Apache-2.0
"""``train_step``: slots, what a loss may return, metrics, purity, no host syncs."""

import dataclasses
import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zfunc as zf
from tests.unit.core.common import (
    F64,
    STAGES,
    alone,
    assert_bitwise,
    example_batch,
    example_params,
    on_mesh,
    one_rank,
    randn,
    reference,
    spec_of,
)
from zfunc.core.errors import LossError
from zfunc.core.sharding import is_sharded
from zfunc.core.step import keep, local_grad
from zfunc.core.tree import leaves_with_path, tree_structure
from zfunc.testing import simulate, split_batch, spmd

SYNCS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "unique")


class NoSync(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name in SYNCS or name.startswith("unique"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def loss(params, batch):
    y = torch.tanh(batch["x"] @ params["w"] + params["b"])
    return (y - batch["y"]).square().mean() + 0.1 * params["v"].square().mean()


def metrics_of(loss_fn, batch=None, params=None, *transforms):
    step = zf.train_step(loss_fn, zf.optim.sgd(0.1), *transforms)
    return step(zf.shard(params or example_params(), alone()), batch).metrics


# --- slots --------------------------------------------------------------------


def test_a_plain_step_has_the_plain_slots():
    tx = zf.optim.sgd(0.1)
    step = zf.train_step(loss, tx)
    assert isinstance(step, zf.TrainStep)
    assert step.tx is tx
    assert step.grad is local_grad
    assert step.accumulate is keep
    assert step._fields == ("loss", "tx", "grad", "accumulate", "scaling")


@pytest.mark.parametrize(
    ("transform", "slots"),
    [
        (zf.precision("bf16"), {"loss"}),
        (zf.accumulate(2), {"accumulate"}),
        (zf.partition(zero=1), {"grad", "accumulate"}),
    ],
)
def test_a_transformation_replaces_its_slots_and_nothing_else(transform, slots):
    before = zf.train_step(loss, zf.optim.sgd(0.1))
    after = transform(before)
    changed = {
        name
        for name in before._fields
        if getattr(before, name) is not getattr(after, name)
    }
    assert changed == slots
    assert before.accumulate is keep


def test_the_name_of_a_step_says_what_it_is():
    step = zf.train_step(
        loss,
        zf.optim.sgd(0.1),
        zf.partition(zero=3),
        zf.accumulate(4),
        zf.precision("bf16"),
    )
    assert repr(step) == (
        "<TrainStep loss=precision(compute=bf16,output=f32) . loss "
        "grad=partition(zero=3) accumulate=partition(zero=3) . keep . accumulate(4)>"
    )


def test_making_a_step_does_not_touch_the_loss():
    name = loss.__name__
    zf.train_step(loss, zf.optim.sgd(0.1), zf.precision("bf16"))
    assert loss.__name__ == name


def test_a_callable_object_and_a_partial_are_losses():
    class Loss:
        def __call__(self, params, batch):
            return loss(params, batch)

    want = metrics_of(loss, example_batch())
    for other in (Loss(), functools.partial(lambda s, p, b: s * loss(p, b), 1.0)):
        assert_bitwise(metrics_of(other, example_batch()), want)


# --- what a step is -----------------------------------------------------------


@pytest.mark.parametrize("zero", [None, *STAGES])
def test_nothing_that_is_given_changes(zero):
    mesh = alone() if zero is None else one_rank()
    where = () if zero is None else (zf.partition(zero=zero),)
    tx = zf.optim.adam(0.1)
    state = zf.shard(example_params(), mesh, tx=tx, spec=None if zero else zf.P())
    batch = example_batch()
    before = zf.tree_map(torch.clone, (state, batch))
    versions = [x._version for x in zf.tree_leaves((state, batch))]
    step = zf.train_step(loss, tx, *where, zf.accumulate(2))
    first, second = step(state, batch), step(state, batch)
    assert_bitwise((state, batch), before)
    assert [x._version for x in zf.tree_leaves((state, batch))] == versions
    assert_bitwise(first, second)


@pytest.mark.parametrize("zero", [None, *STAGES])
def test_a_loss_that_writes_to_its_parameters_is_refused(zero):
    """As F.embedding(..., max_norm=1) does."""

    def writing(params, batch):
        with torch.no_grad():
            params["w"].mul_(2)
        return loss(params, batch)

    mesh = alone() if zero is None else one_rank()
    where = () if zero is None else (zf.partition(zero=zero),)
    state = zf.shard(example_params(), mesh, spec=None if zero else zf.P())
    step = zf.train_step(writing, zf.optim.sgd(0.1), *where)
    with pytest.raises(zf.LossError, match=r"the loss wrote to params\['w"):
        step(state, example_batch())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("zero", [None, *STAGES])
def test_modes_around_a_step_do_not_matter(zero, mode):
    mesh = alone() if zero is None else one_rank()
    where = () if zero is None else (zf.partition(zero=zero),)
    step = zf.train_step(loss, zf.optim.sgd(0.1), *where)

    def run():
        state = zf.shard(example_params(), mesh, spec=None if zero else zf.P())
        return zf.unshard(step(step(state, example_batch()), example_batch()))

    with mode():
        got = run()
    assert_bitwise(got, run())


@pytest.mark.parametrize("zero", [None, *STAGES])
def test_the_host_never_waits(zero):
    def blocks(params, batch, key):
        block = zf.remat(lambda w, x: torch.tanh(x @ w))
        y = zf.random.dropout(key, block(params["w"], batch["x"]), 0.5)
        weight = (batch["index"] > 1).sum()
        return zf.Mean((y + params["b"]).square().sum(), weight), {"weight": weight}

    mesh = alone() if zero is None else one_rank()
    where = () if zero is None else (zf.partition(zero=zero),)
    tx = zf.optim.chain(zf.optim.clip_by_global_norm(1.0), zf.optim.adamw(0.1))
    step = zf.train_step(blocks, tx, *where, zf.accumulate(2), zf.precision("bf16"))
    state = zf.shard(example_params(), mesh, spec=None if zero else zf.P())
    batch = example_batch()
    with NoSync():
        state = step(step(state, batch), batch)
    assert float(state.metrics.loss) > 0


@pytest.mark.parametrize("zero", STAGES)
@pytest.mark.parametrize("ranks", [1, 1024])
def test_a_step_runs_on_shapes_alone(zero, ranks):
    mesh = zf.AbstractMesh({"data": ranks})
    tx = zf.optim.adamw(0.1)
    step = zf.train_step(loss, tx, zf.partition(zero=zero), zf.accumulate(2))

    def program(params, batch):
        state = zf.shard(params, mesh, tx=tx, spec=spec_of(zero))
        return state, step(state, batch)

    before, after = zf.eval_shape(program, example_params(), example_batch())
    assert tree_structure(after) == tree_structure(before)
    for (path, a), (_, b) in zip(
        leaves_with_path(before.params), leaves_with_path(after.params), strict=True
    ):
        assert a.shape == b.shape, path


def test_counts_up_and_keeps_the_key():
    state = zf.shard(example_params(), alone(), key=3)
    step = zf.train_step(loss, zf.optim.sgd(0.1))
    for i in range(1, 4):
        state = step(state, example_batch())
        assert int(state.step) == i
    assert int(state.key) == 3


def test_plain_tensors_are_a_state_too():
    state = zf.shard(example_params(), alone())
    step = zf.train_step(loss, zf.optim.sgd(0.1))
    got = step(zf.unshard(state), example_batch())
    assert_bitwise(got.params, zf.unshard(step(state, example_batch())).params)
    assert all(type(x) is torch.Tensor for x in got.params.values())


def test_old_metrics_hold_no_memory_of_the_step():
    metrics = metrics_of(loss, example_batch())
    assert all(x.grad_fn is None for x in zf.tree_leaves(metrics))
    assert all(x.untyped_storage().nbytes() <= 8 for x in zf.tree_leaves(metrics))


# --- what a loss may return ---------------------------------------------------


class Out(NamedTuple):
    loss: Any
    aux: Any


def total(params):
    return sum(x.sum() for x in params.values())


@pytest.mark.parametrize(
    "value",
    [
        lambda t: t,
        lambda t: (t, {}),
        lambda t: (t, None),
        lambda t: zf.Mean(2 * t, 2),
        lambda t: zf.Mean(2 * t, torch.tensor(2)),
        lambda t: (zf.Mean(2 * t, 2.0), {}),
        lambda t: Out(t, {}),
    ],
)
def test_forms_of_the_same_loss(value):
    got = reference(lambda p, b: value(total(p)), example_params(), None)
    want = reference(lambda p, b: total(p), example_params(), None)
    assert_bitwise(got.grads, want.grads)
    torch.testing.assert_close(got.metrics.loss, want.metrics.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_losses_are_counted_in_float32(dtype):
    metrics = metrics_of(lambda p, b: (total(p).to(dtype), {"a": total(p).to(dtype)}))
    assert metrics.loss.dtype == metrics.aux["a"].dtype == torch.float32


@pytest.mark.parametrize("zero", [None, *STAGES])
@pytest.mark.parametrize("ranks", [1, 2])
def test_aux_is_any_tree_of_scalars_and_means(zero, ranks):
    def with_aux(params, batch):
        n = batch["index"].sum()
        aux = {
            "nested": [1, 2.5, True, (torch.tensor(3), None)],
            "mean": zf.Mean(batch["x"].sum(), n),
            "int": n,
            "param": params["w"].sum(),
        }
        return loss(params, batch), aux

    batch = example_batch()
    if zero is None:
        got = reference(with_aux, example_params(), batch).metrics.aux
        ranks = 1
    else:
        got = on_mesh(with_aux, example_params(), batch, zero=zero, ranks=ranks)
        got = got.metrics.aux
    assert [float(x) for x in zf.tree_leaves(got["nested"])] == [1, 2.5, 1, 3]
    n = batch["index"].sum()
    torch.testing.assert_close(got["mean"], batch["x"].sum() / n)
    assert float(got["int"]) == float(n) / ranks
    torch.testing.assert_close(got["param"], example_params()["w"].sum())


@pytest.mark.parametrize("weight", [0, 0.0, torch.tensor(0)])
def test_a_loss_of_no_weight_trains_nothing(weight):
    state = reference(
        lambda p, b: zf.Mean(0 * total(p), weight), example_params(), None
    )
    assert state.metrics.loss == 0
    assert_bitwise(state.params, example_params())


def test_a_loss_that_ignores_the_parameters_trains_nothing():
    params, batch = example_params(), example_batch()
    for zero in STAGES:
        state = on_mesh(lambda p, b: b["x"].mean(), params, batch, zero=zero, ranks=2)
        assert all((g == 0).all() for g in state.grads.values())
        assert state.metrics.grad_norm == 0
        assert_bitwise(state.params, params)


@pytest.mark.parametrize("batch", [None, (), {}, {"n": 3}, [2.0, "text"], 5])
def test_a_batch_without_tensors(batch):
    assert metrics_of(lambda p, b: total(p), batch).loss == total(example_params())


def test_integer_and_static_leaves_reach_the_loss_as_they_are():
    seen = []

    def looking(params, batch):
        seen.append(batch)
        return total(params)

    batch = {
        "i": torch.arange(4),
        "b": torch.ones(4, dtype=torch.bool),
        "s": "x",
        "n": None,
    }
    metrics_of(looking, batch)
    assert seen[0]["i"] is batch["i"]
    assert seen[0]["b"].dtype == torch.bool
    assert seen[0]["s"] == "x"
    assert seen[0]["n"] is None


# --- keys ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, b, key: total(p) + 0 * key.numel(),
        lambda p, b, key=None: total(p) + 0 * key.numel(),
        lambda p, b, keys: total(p) + 0 * keys.numel(),
        zf.remat(lambda p, b, key: total(p) + 0 * key.sum()),
    ],
)
def test_a_loss_that_asks_for_a_key_gets_one_per_sample(loss_fn):
    assert metrics_of(loss_fn, example_batch()).loss == total(example_params())


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, b, scale=1.0: scale * total(p),
        lambda *args: total(args[0]),
    ],
)
def test_a_loss_that_does_not_gets_none(loss_fn):
    assert metrics_of(loss_fn, example_batch()).loss == total(example_params())


def test_a_keyword_only_key_is_a_key():
    def keyed(params, batch, *, key):
        return total(params) + 0 * key.sum()

    assert metrics_of(keyed, example_batch()).loss == total(example_params())


def test_a_key_goes_to_the_argument_of_that_name():
    def keyed(params, batch, scale=1.0, key=None):
        return scale * total(params) + 0 * key.sum()

    assert metrics_of(keyed, example_batch()).loss == total(example_params())


def test_there_is_one_key_per_sample():
    shapes = []

    def keyed(params, batch, key):
        shapes.append((key.shape, key.dtype))
        return total(params)

    metrics_of(keyed, example_batch())
    metrics_of(keyed, {"scale": torch.tensor(1.0), "x": torch.ones(3, 2)})
    metrics_of(keyed, example_batch(), None, zf.accumulate(3))
    assert (
        shapes == [((6,), torch.int64), ((3,), torch.int64)] + [((2,), torch.int64)] * 3
    )


# --- moments ------------------------------------------------------------------


def test_moments_survive_a_change_of_the_stage():
    tx = zf.optim.adam(0.1)
    state = zf.shard(example_params(), one_rank(), tx=tx)
    for zero in (1, 3, 2):
        state = zf.train_step(loss, tx, zf.partition(zero=zero))(state, example_batch())
    want = zf.shard(example_params(), alone(), tx=tx)
    for _ in range(3):
        want = zf.train_step(loss, tx)(want, example_batch())
    assert_bitwise(zf.unshard(state).params, zf.unshard(want).params)


def test_update_sees_the_mean_gradient():
    seen = []

    def update(grads, moments, params):
        seen.append(zf.tree_map(torch.clone, grads))
        return zf.tree_map(torch.zeros_like, grads), moments

    tx = zf.optim.GradientTransformation(lambda p: (), update)
    params, batch = {"w": randn(3)}, torch.ones(4, dtype=F64)

    def weighted(p, b):
        return zf.Mean(p["w"].sum() * b.sum(), b.sum() * 2)

    state = zf.train_step(weighted, tx, zf.accumulate(2))(
        zf.shard(params, alone()), batch
    )
    assert torch.equal(seen[0]["w"].buffer, torch.full((3,), 0.5, dtype=F64))
    assert_bitwise(state.grads, seen[0])
    assert_bitwise(zf.unshard(state).params, params)


def test_errors_of_the_loss_pass_through():
    def broken(params, batch):
        raise KeyError("mask")

    with pytest.raises(KeyError, match="mask"):
        metrics_of(broken)


@pytest.mark.parametrize("weight", ["text", torch.ones(2), None])
def test_weights_that_are_none(weight):
    with pytest.raises(LossError, match="weight"):
        metrics_of(lambda p, b: zf.Mean(total(p), weight))


# --- a step is a function: it can be differentiated, and mapped ----------------


def after_training(transforms, mesh, num_steps=2):
    """The loss after some steps, as a function of the initial parameters."""

    batch = example_batch()

    def last_loss(params):
        step = zf.train_step(small_loss, zf.optim.sgd(0.5), *transforms)
        state = zf.shard(SMALL, mesh, spec=None if mesh.axes else zf.P())
        placed = zf.tree_map(
            lambda leaf, x: dataclasses.replace(leaf, buffer=x),
            state.params,
            params,
            is_leaf=is_sharded,
        )
        state = state.replace(params=placed)
        for _ in range(num_steps):
            state = step(state, batch)
        return small_loss(zf.unshard(state).params, batch)

    return last_loss


SMALL = {"b": randn(4, seed=1), "w": randn(5, 4)}


def small_loss(params, batch):
    y = torch.tanh(batch["x"] @ params["w"] + params["b"])
    return (y - batch["y"]).square().mean()


WAYS = {
    "alone": (alone, ()),
    "zero=1": (one_rank, (zf.partition(zero=1),)),
    "zero=3": (one_rank, (zf.partition(zero=3),)),
    "accumulate": (one_rank, (zf.partition(zero=2), zf.accumulate(3))),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_derivative_through_training(name):
    """Against finite differences; in reverse, forward and under vmap."""
    mesh, transforms = WAYS[name]
    f = after_training(transforms, mesh())
    direction = {"b": randn(4, seed=7), "w": randn(5, 4, seed=8)}

    def along(t):
        return f({k: SMALL[k] + t * direction[k] for k in SMALL})

    eps = 1e-5
    want = (along(eps) - along(-eps)) / (2 * eps)
    zero = torch.zeros((), dtype=F64)
    _, grads = zf.value_and_grad(f)(SMALL)
    got = sum((grads[k] * direction[k]).sum() for k in SMALL)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    forward = torch.func.jvp(along, (zero,), (zero + 1,))[1]
    torch.testing.assert_close(forward, got, rtol=1e-10, atol=1e-12)
    two = torch.vmap(along)(torch.tensor([0.0, 0.1], dtype=F64))
    torch.testing.assert_close(
        two, torch.stack([along(0.0), along(0.1)]), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("zero", [1, 3])
def test_the_derivative_through_sharded_training(zero):
    """On two ranks: each has the piece of the whole gradient that it stores."""
    step = zf.train_step(small_loss, zf.optim.sgd(0.5), zf.partition(zero=zero))
    batch = split_batch(example_batch(), {"data": 2})
    state = simulate(step, {"data": 2}).shard(SMALL)

    def program(mesh, state, batch):
        def last_loss(params):
            after = state.replace(params=params)
            for _ in range(2):
                after = step(after, batch)
            # What is differentiated is the sum over ranks.
            loss = small_loss(zf.unshard(after).params, batch)
            return zf.pmean(loss, "data", mesh) / 2

        grads = zf.value_and_grad(last_loss)(state.params)[1]
        return zf.core.sharding.replicate(grads)

    grads = spmd(program, {"data": 2})(state, batch)
    _, want = zf.value_and_grad(after_training((), alone()))(SMALL)
    for k in SMALL:
        for rank in range(2):
            torch.testing.assert_close(grads[k][rank], want[k], rtol=1e-9, atol=1e-12)
