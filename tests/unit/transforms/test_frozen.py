# SPDX-License-Identifier: Apache-2.0
"""``with_frozen``: the gradient in the trained parameters, and nothing of the rest."""

import pytest
import torch

import zfunc as zf
from tests.unit.core.common import F64, assert_bitwise, one_rank, randn

TREE = {
    "a": {"w": randn(6, 5, seed=1), "b": randn(5, seed=2)},
    "head": {"w": randn(5, 3, seed=3)},
}


def loss_fn(p, batch):
    x = torch.tanh(batch @ p["a"]["w"] + p["a"]["b"])
    return ((x @ p["head"]["w"]) ** 2).mean()


def blocks(p, batch):
    def block(w, b, x):
        return torch.tanh(x @ w + b)

    x = zf.remat(block)(p["a"]["w"], p["a"]["b"], batch)
    return ((x @ p["head"]["w"]) ** 2).mean()


def halves():
    """Trained and frozen: a bias among them, as in training of biases only."""
    trained = {"a": {"b": TREE["a"]["b"]}, "head": TREE["head"]}
    return trained, {"a": {"w": TREE["a"]["w"]}}


def placed(frozen, how):
    mesh = one_rank()
    if how == "plain":
        return frozen
    return zf.shard(frozen, mesh, spec=zf.P() if how == "whole" else None).params


@pytest.mark.parametrize("loss", [loss_fn, blocks])
@pytest.mark.parametrize("how", ["plain", "whole", "sharded"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("jit", [False, True])
def test_the_gradient_is_that_of_the_whole_loss(zero, how, loss, jit):
    trained, frozen = halves()
    step = zf.train_step(
        zf.with_frozen(loss, placed(frozen, how)),
        zf.optim.sgd(0.1),
        zf.partition(zero=zero),
        zf.accumulate(2),
    )
    step = zf.jit(step, donate=False) if jit else step
    state = zf.shard(trained, one_rank(), spec=zf.P() if zero == 0 else None)
    for seed in range(2):
        state = step(state, randn(4, 6, seed=seed))
    assert len(zf.tree_leaves(state.grads)) == 2

    tree = zf.tree_map(lambda x: x.clone(), TREE)
    for seed in range(2):
        leaves = [tree["a"]["b"], tree["head"]["w"]]
        for leaf in leaves:
            leaf.requires_grad_()
        loss_fn(tree, randn(4, 6, seed=seed)).backward()
        grads = [leaf.grad for leaf in leaves]
        tree["a"]["b"], tree["head"]["w"] = (
            (x - 0.1 * x.grad).detach() for x in leaves
        )
    full = zf.unshard(state)
    for got, want in zip(
        [full.params["a"]["b"], full.params["head"]["w"], *zf.tree_leaves(full.grads)],
        [tree["a"]["b"], tree["head"]["w"], *grads],
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_compute_in_the_dtype_of_the_trained_ones():
    seen = {}

    def loss(p, batch):
        seen.update({k: x.dtype for k, x in p.items()})
        return (p["w"] * p["b"] * batch).sum().float()

    mesh = one_rank()
    frozen = zf.shard({"w": torch.ones(2)}, mesh).params
    step = zf.train_step(
        zf.with_frozen(loss, frozen),
        zf.optim.sgd(0.1),
        zf.partition(zero=3),
        zf.precision("bf16"),
    )
    step(zf.shard({"b": torch.ones(2)}, mesh), torch.ones(2))
    assert seen == {"w": torch.bfloat16, "b": torch.bfloat16}


def test_a_wider_frozen_one_keeps_its_dtype_where_the_trained_ones_differ():
    seen = {}

    def loss(p, batch):
        seen.update({k: x.dtype for k, x in p.items()})
        return p["c"].sum() + p["b"].float().sum()

    params = {"b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(2)}
    wrapped = zf.with_frozen(loss, {"w": torch.ones(2, dtype=F64)})
    wrapped(params, None)
    assert seen["w"] == F64


def test_a_loss_that_takes_a_key_takes_it_still():
    def loss(p, batch, key):
        return (p["w"] * p["b"] * zf.random.uniform(key, (len(batch), 2))).sum()

    def whole(p, batch, key):
        return loss({**p, "w": torch.full((2,), 2.0)}, batch, key)

    states = [
        zf.train_step(fn, zf.optim.sgd(0.1))(
            zf.shard({"b": torch.ones(2)}, zf.make_mesh({})), torch.ones(4)
        )
        for fn in (zf.with_frozen(loss, {"w": torch.full((2,), 2.0)}), whole)
    ]
    assert_bitwise(states[0].params, states[1].params)


@pytest.mark.parametrize(
    ("frozen", "error", "message"),
    [
        (
            {"a": {"ids": torch.ones(2, dtype=torch.int64)}},
            TypeError,
            "frozen['a/ids'] must be a floating tensor, got torch.int64: close over "
            "buffers in the loss.",
        ),
        ({"a": 3}, TypeError, "frozen['a'] must be a floating tensor, got int: close"),
    ],
)
def test_what_cannot_be_frozen(frozen, error, message):
    with pytest.raises(error) as caught:
        zf.with_frozen(loss_fn, frozen)
    assert str(caught.value).startswith(message)


def test_another_axis():
    frozen = zf.shard({"w": torch.ones(2)}, one_rank()).params
    with pytest.raises(zf.MeshError) as caught:
        zf.with_frozen(loss_fn, frozen, axis="tensor")
    assert str(caught.value) == (
        "frozen['w'] is sharded over ['data'], and with_frozen gathers over "
        "axis='tensor': move it with zf.reshard, or pass axis=."
    )


def test_no_function():
    with pytest.raises(TypeError, match="with_frozen: loss_fn must be a function"):
        zf.with_frozen(None, {})


@pytest.mark.parametrize("frozen", [None, (), [torch.ones(2)], torch.ones(2)])
def test_frozen_ones_are_a_dict(frozen):
    with pytest.raises(TypeError, match=r"frozen is a .*, expected a dict of param"):
        zf.with_frozen(loss_fn, frozen)


def test_trained_ones_are_a_dict():
    with pytest.raises(zf.StructureError) as caught:
        zf.with_frozen(loss_fn, {"w": torch.ones(2)})([torch.ones(2)], None)
    assert str(caught.value).startswith("params is a list and the frozen ones are a d")


@pytest.mark.parametrize("frozen", [TREE, {"a": {"b": TREE["a"]["b"]}}])
def test_a_parameter_that_is_both(frozen):
    trained, _ = halves()
    with pytest.raises(zf.StructureError) as caught:
        zf.with_frozen(loss_fn, frozen)(trained, randn(4, 6))
    assert "params['a/b'] is both trained and frozen" in str(caught.value)


def test_the_first_of_several_that_are_both_is_named():
    names = [f"w{i}" for i in range(30)]  # not the first of a set, by its hash
    both = {name: torch.ones(1) for name in names}
    with pytest.raises(zf.StructureError, match=r"params\['w0'\] is both"):
        zf.with_frozen(loss_fn, both)(both, None)
