# SPDX-License-Identifier: Apache-2.0
"""``donate``: the same bits in less memory, and no second use of what was given."""

import copy

import pytest
import torch

import zfunc as zf
from tests.unit.core.common import (
    STAGES,
    alone,
    assert_bitwise,
    example_batch,
    example_params,
    one_rank,
    randn,
)
from zfunc.core.errors import DonatedBufferError, PlacementError
from zfunc.core.tree import leaves_with_path, tree_leaves
from zfunc.optim import GradientTransformation
from zfunc.testing.memory import peak_live_bytes


def loss(params, batch):
    y = torch.tanh(batch["x"] @ params["w"] + params["b"])
    return (y - batch["y"]).square().mean() + 0.1 * params["v"].square().mean()


def scaled(grads):
    return zf.tree_map(lambda g: -0.1 * g, grads)


def halfway(a, b):
    return zf.tree_map(lambda x, y: 0.5 * x + 0.5 * y, a, b)


def zeros(params):
    return zf.tree_map(torch.zeros_like, params)


def same(params):
    return params


# Optimizers whose moments share memory with the parameters or the gradients.
OPTIMIZERS = {
    "sgd": zf.optim.sgd(0.1),
    "adamw": zf.optim.adamw(0.1),
    "clipped": zf.optim.chain(zf.optim.clip_by_global_norm(0.1), zf.optim.adam(0.1)),
    "last gradient": GradientTransformation(
        zeros, lambda g, m, p: (scaled(g), g), leafwise=True
    ),
    "last parameters": GradientTransformation(same, lambda g, m, p: (scaled(g), p)),
    "last parameters, leafwise": GradientTransformation(
        same, lambda g, m, p: (scaled(g), p), leafwise=True
    ),
    "first parameters": GradientTransformation(same, lambda g, m, p: (scaled(g), m)),
    "mean parameters": GradientTransformation(
        same, lambda g, m, p: (scaled(g), halfway(m, p)), leafwise=True
    ),
    "update is the gradient": GradientTransformation(
        lambda p: (), lambda g, m, p: (g, m), leafwise=True
    ),
    "tuple of moments": GradientTransformation(
        lambda p: (zeros(p), [zeros(p), torch.zeros(())]),
        lambda g, m, p: (scaled(g), (g, [m[0], m[1][1] + 1])),
        leafwise=True,
    ),
}


def train(step, state, steps=3):
    for _ in range(steps):
        state = step(state, example_batch())
    return zf.tree_map(torch.clone, state)


@pytest.mark.parametrize("up_front", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_same_bits_with_every_optimizer(name, up_front):
    tx = OPTIMIZERS[name]
    pure = zf.train_step(loss, tx)
    given = tx if up_front else None
    want = train(pure, zf.shard(example_params(), alone(), tx=given))
    got = train(zf.donate(pure), zf.shard(example_params(), alone(), tx=given))
    assert_bitwise(got, want)


@pytest.mark.parametrize("zero", STAGES)
def test_the_same_bits_at_every_stage(zero):
    tx = zf.optim.adam(0.1)
    pure = zf.train_step(loss, tx, zf.partition(zero=zero), zf.accumulate(2))
    spec = zf.P() if zero == 0 else None
    want = train(pure, zf.shard(example_params(), one_rank(), spec=spec))
    got = train(zf.donate(pure), zf.shard(example_params(), one_rank(), spec=spec))
    assert_bitwise(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_bits_of_narrow_parameters(dtype):
    tx = zf.optim.adam(0.1)
    batch = zf.tree_map(
        lambda x: x.to(dtype) if x.is_floating_point() else x, example_batch()
    )
    pure = zf.train_step(lambda p, b: loss(p, b).float(), tx)
    want = pure(zf.shard(example_params(), alone(), dtype=dtype), batch)
    got = zf.donate(pure)(zf.shard(example_params(), alone(), dtype=dtype), batch)
    assert_bitwise(got, want)


# --- what is left of a donated state ------------------------------------------

USES = {
    "add": lambda x: x + 1,
    "radd": lambda x: 1 + x,
    "sum": lambda x: x.sum(),
    "index": lambda x: x[0],
    "len": len,
    "iterate": list,
    "shape": lambda x: x.shape,
    "dtype": lambda x: x.dtype,
    "clone": torch.clone,
    "matmul": lambda x: torch.ones(1, 1) @ x,
    "stack": lambda x: torch.stack([torch.ones(()), x]),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "float": float,
    "data_ptr": lambda x: x.data_ptr(),
    "compare": lambda x: x == 1,
    "cast": lambda x: x.half(),
    "detach": lambda x: x.detach(),
    "deepcopy": copy.deepcopy,
}


def donated(tx=None):
    tx = tx or zf.optim.adam(0.1)
    old = zf.shard(example_params(), alone(), tx=tx)
    new = zf.donate(zf.train_step(loss, tx))(old, example_batch())
    return old, new


@pytest.mark.parametrize("use", USES)
def test_every_use_of_a_buffer_raises(use):
    old, _ = donated()
    with pytest.raises(DonatedBufferError, match=r"state.params\['w'\] was donated"):
        USES[use](old.params["w"].buffer)


@pytest.mark.parametrize(
    ("use", "path"),
    [
        (lambda s: zf.unshard(s).params["b"] + 1, r"params\['b'\]"),
        (lambda s: zf.tree_map(torch.clone, s.grads), r"grads\['b'\]"),
        (lambda s: zf.tree_map(torch.clone, s.moments), r"moments\['1/mu/b'\]"),
        (lambda s: zf.global_norm(s.params), r"params\['b'\]"),
        (lambda s: zf.train_step(loss, zf.optim.sgd(0.1))(s, None), r"params\['b'\]"),
        (
            lambda s: zf.donate(zf.train_step(loss, zf.optim.sgd(0.1)))(s, None),
            "params",
        ),
        (
            lambda s: zf.train_step(loss, zf.optim.sgd(1.0))(s.replace(step=s.step), 0),
            "p",
        ),
    ],
)
def test_every_use_of_the_state_names_the_leaf(use, path):
    old, _ = donated()
    with pytest.raises(DonatedBufferError, match=path):
        use(old)


def test_step_key_metrics_and_structure_stay_readable():
    old, new = donated()
    assert int(old.step) == 0
    assert int(old.key) == 0
    assert float(old.metrics.loss) == 0
    assert zf.core.tree.tree_structure(old.params) == zf.core.tree.tree_structure(
        new.params
    )
    assert "was donated" in repr(old)
    assert [p for p, _ in leaves_with_path(old.params)] == [
        "b/buffer",
        "v/buffer",
        "w/buffer",
    ]


# --- only what was given is consumed ------------------------------------------


@pytest.mark.parametrize("mesh", [alone, one_rank])
@pytest.mark.parametrize(
    "take",
    [
        lambda s: zf.unshard(s).params,
        lambda s: zf.core.sharding.replicate(s.params),
        lambda s: zf.tree_map(lambda x: x, s.params),
    ],
    ids=["unshard", "replicate", "tree_map"],
)
def test_what_was_taken_before_does_not_change(take, mesh):
    where = (zf.partition(zero=1),) if mesh().axes else ()
    state = zf.shard(example_params(), mesh())
    taken = take(state)
    want = [x.clone() for x in tree_leaves(taken)]
    zf.donate(zf.train_step(loss, zf.optim.sgd(0.1), *where))(state, example_batch())
    assert_bitwise(tree_leaves(taken), want)


def test_the_users_tensors_and_the_batch_are_not_consumed():
    params, batch = example_params(), example_batch()
    state = zf.shard(params, alone())
    zf.donate(zf.train_step(loss, zf.optim.sgd(0.1)))(state, batch)
    assert_bitwise(params, example_params())
    assert_bitwise(batch, example_batch())


@pytest.mark.parametrize("transforms", [(), (zf.accumulate(4),)])
def test_a_step_that_raises_does_not_cost_the_state(transforms):
    """A batch that is refused, or a loss with a bug, must not end the training."""

    def broken(params, batch):
        raise ValueError("a batch that does not fit")

    fn = loss if transforms else broken
    state = zf.shard(example_params(), alone())
    with pytest.raises(ValueError, match="does not"):
        zf.donate(zf.train_step(fn, zf.optim.sgd(0.1), *transforms))(
            state, example_batch()
        )
    assert_bitwise(zf.unshard(state).params, example_params())


@pytest.mark.parametrize("fields", [{"grads": None}, {"grads": None, "moments": None}])
def test_a_state_without_gradients(fields):
    """As one that was made to save memory, or read from a file."""
    tx = zf.optim.adam(0.1)
    state = zf.shard(example_params(), alone(), tx=tx).replace(**fields)
    step = zf.train_step(loss, tx)
    want = zf.tree_map(torch.clone, step(state, example_batch()))
    with pytest.raises(ValueError, match="does not divide"):
        zf.donate(zf.train_step(loss, tx, zf.accumulate(4)))(state, example_batch())
    assert_bitwise(zf.donate(step)(state, example_batch()), want)


def test_one_leaf_at_two_places_of_the_state():
    """Two leaves that are one buffer would be updated twice."""
    leaf = zf.shard(randn(3), alone()).params
    fresh = zf.shard({"a": randn(3), "b": randn(3)}, alone())
    tied = fresh.replace(params={"a": leaf, "b": leaf})
    step = zf.train_step(lambda p, b: (p["a"] * p["b"]).sum(), zf.optim.sgd(0.1))
    want = [x.clone() for x in tree_leaves(step(tied, None).params)]
    try:
        got = zf.donate(step)(tied, None)
    except (PlacementError, DonatedBufferError):
        return  # refusing it is as good
    assert_bitwise(tree_leaves(got.params), want)


# --- memory, misuse -----------------------------------------------------------


@pytest.mark.parametrize("leafwise", [True, False])
def test_donating_saves_memory(leafwise):
    width, layers = 64, 12
    params = [randn(width, width, seed=i, dtype=torch.float32) for i in range(layers)]
    psi = 4 * layers * width * width
    tx = zf.optim.adam(0.1)
    tx = tx if leafwise else tx._replace(leafwise=False)

    def small(params, batch):
        return sum((p * p).sum() for p in params)

    step = zf.train_step(small, tx)
    _, pure = peak_live_bytes(step, zf.shard(params, alone(), tx=tx), ())
    _, peak = peak_live_bytes(
        zf.donate(step), zf.shard(params, alone(), tx=tx), (), donated=True
    )
    assert peak < pure - (1.5 * psi if leafwise else 0.5 * psi)
    if leafwise:
        assert peak < 5.5 * psi  # parameters, gradients, two moments, a few leaves


@pytest.mark.parametrize("thing", [3, loss, None, zf.partition(zero=1)])
def test_donate_takes_a_step(thing):
    with pytest.raises(TypeError, match="donate takes a TrainStep"):
        zf.donate(thing)


def test_a_state_of_plain_tensors_cannot_be_taken_over():
    state = zf.unshard(zf.shard(example_params(), alone()))
    with pytest.raises(PlacementError, match="a step cannot take over"):
        zf.donate(zf.train_step(loss, zf.optim.sgd(0.1)))(state, example_batch())
    assert_bitwise(state.params, example_params())
