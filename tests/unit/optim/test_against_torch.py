# SPDX-License-Identifier: Apache-2.0
"""Optimizers and clips against torch.optim and torch.nn.utils, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zfunc.core.mesh import make_mesh
from zfunc.core.sharding import NamedSharding, P, place
from zfunc.core.tree import tree_leaves, tree_map
from zfunc.optim import (
    GradientTransformation,
    adam,
    adamw,
    apply_updates,
    chain,
    clip_by_global_norm,
    clip_by_value,
    sgd,
    warmup_cosine,
)

STEPS = 8
SHAPES = {"b": (3,), "s": (), "w": (5, 3)}


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def start() -> dict[str, Tensor]:
    return {k: randn(*s, seed=i) for i, (k, s) in enumerate(SHAPES.items())}


def gradient(p: Tensor, step: int) -> Tensor:
    """Depends on the parameters, so that a wrong step makes the next ones wrong too."""
    return 0.5 * p + randn(*p.shape, seed=100 + step)


def ours(tx: GradientTransformation) -> list[Tensor]:
    params = start()
    moments, path = tx.init(params), []
    for step in range(STEPS):
        grads = {k: gradient(p, step) for k, p in params.items()}
        updates, moments = tx.update(grads, moments, params)
        params = apply_updates(params, updates)
        path += tree_leaves(params)
    return path


def torchs(
    make: Callable[..., torch.optim.Optimizer],
    before_step: Callable[[list[Tensor]], Any] = lambda params: None,
    schedule: Callable[[int], float] | None = None,
    **options: Any,
) -> list[Tensor]:
    params = [p.requires_grad_() for p in start().values()]
    optimizer, path = make(params, **options), []
    for step in range(STEPS):
        for p in params:
            p.grad = gradient(p.detach(), step)
        if schedule:
            optimizer.param_groups[0]["lr"] = schedule(step)
        before_step(params)
        optimizer.step()
        path += [p.detach().clone() for p in params]
    return path


def assert_same(path: list[Tensor], expected: list[Tensor]) -> None:
    assert len(path) == len(expected) == STEPS * len(SHAPES)
    for ours_, theirs in zip(path, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-12, atol=1e-13)


# --- optimizers ------------------------------------------------------------------


@pytest.mark.parametrize("lr", [0.1, 1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(
    ("momentum", "nesterov", "dampening"),
    [(0.0, False, 0.0), (0.9, False, 0.0), (0.9, True, 0.0), (0.9, False, 0.3)],
)
def test_sgd(lr, momentum, nesterov, weight_decay, dampening):
    options = {
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "dampening": dampening,
    }
    assert_same(ours(sgd(lr, **options)), torchs(torch.optim.SGD, lr=lr, **options))


@pytest.mark.parametrize(
    ("make", "make_torch"), [(adam, torch.optim.Adam), (adamw, torch.optim.AdamW)]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.6), (0.0, 0.9), (0.9, 0.0)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2, 0.0])
def test_adam_and_adamw(make, make_torch, weight_decay, betas, eps):
    options = {"eps": eps, "weight_decay": weight_decay}
    path = ours(make(0.05, *betas, **options))
    assert_same(path, torchs(make_torch, lr=0.05, betas=betas, **options))


@given(
    lr=st.floats(0, 0.5),
    b1=st.floats(0, 0.999),
    b2=st.floats(0, 0.9999),
    eps=st.floats(1e-10, 1.0),
    weight_decay=st.floats(0, 1),
)
def test_adamw_of_any_hyper_parameters(lr, b1, b2, eps, weight_decay):
    path = ours(adamw(lr, b1, b2, eps, weight_decay))
    options = {"betas": (b1, b2), "eps": eps, "weight_decay": weight_decay}
    assert_same(path, torchs(torch.optim.AdamW, lr=lr, **options))


@given(
    lr=st.floats(0, 0.5),
    momentum=st.floats(0.01, 1.0),
    dampening=st.floats(0, 1),
    weight_decay=st.floats(0, 1),
)
def test_sgd_of_any_hyper_parameters(lr, momentum, dampening, weight_decay):
    options = {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
    }
    assert_same(ours(sgd(lr, **options)), torchs(torch.optim.SGD, lr=lr, **options))


def test_defaults_are_those_of_torch():
    assert_same(ours(adam(1e-3)), torchs(torch.optim.Adam))
    assert_same(ours(adamw(1e-3)), torchs(torch.optim.AdamW))
    assert_same(ours(sgd(1e-3)), torchs(torch.optim.SGD))


@pytest.mark.parametrize(
    ("make", "make_torch"), [(sgd, torch.optim.SGD), (adamw, torch.optim.AdamW)]
)
def test_a_schedule_gives_the_rate_of_every_step(make, make_torch):
    schedule = warmup_cosine(0.2, 2, 6, end=0.01)
    options = {"weight_decay": 0.1}
    path = ours(make(schedule, **options))
    at_step = torchs(make_torch, schedule=lambda t: float(schedule(t)), **options)
    assert_same(path, at_step)


def test_adam_of_zero_gradients_moves_nothing_also_without_eps():
    tx, p = adam(0.1, eps=0.0), torch.zeros(4)
    updates, _ = tx.update(torch.tensor([0.0, 1.0, -1.0, 0.0]), tx.init(p), p)
    torch.testing.assert_close(updates, torch.tensor([0.0, -0.1, 0.1, 0.0]))


def test_bias_corrections_keep_their_precision():
    # 0.999^t in float32 would be off by 1e-5 of 1 - 0.999^t at the first steps.
    p, g = torch.zeros(1), torch.full((1,), 1e-3)
    tx = adam(1.0, eps=0.0)
    moments = tx.init(p)
    for _ in range(5):
        updates, moments = tx.update(g, moments, p)
        torch.testing.assert_close(updates, torch.full((1,), -1.0), rtol=1e-6, atol=0)


# --- clips -----------------------------------------------------------------------


def clipped(tx: GradientTransformation, tree: Any) -> Any:
    return tx.update(tree, tx.init(tree), tree)[0]


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 5.0, 1e3])
def test_clip_by_global_norm_is_torchs(max_norm):
    params = [p.requires_grad_() for p in start().values()]
    for step, p in enumerate(params):
        p.grad = 3 * randn(*p.shape, seed=step)
    grads = [p.grad.clone() for p in params]
    torch.nn.utils.clip_grad_norm_(params, max_norm)
    mesh = make_mesh({"data": 1})
    spec = [P("data") if g.dim() else P() for g in grads]
    placed = [
        place(g, NamedSharding(mesh, s)) for g, s in zip(grads, spec, strict=True)
    ]
    for tree in (grads, placed):
        result = clipped(clip_by_global_norm(max_norm), tree)
        for got, p in zip(tree_leaves(result), params, strict=True):
            torch.testing.assert_close(got, p.grad, rtol=1e-12, atol=0)


@given(st.floats(1e-3, 1e3), st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9))
def test_a_clipped_norm_is_at_most_the_bound(max_norm, values):
    u = torch.tensor(values, dtype=torch.float64)
    result = clipped(clip_by_global_norm(max_norm), u)
    assert result.norm() <= min(max_norm, u.norm()) * (1 + 1e-12)


@pytest.mark.parametrize("limit", [1e-3, 0.5, 2])
def test_clip_by_value_is_torchs(limit):
    params = [p.requires_grad_() for p in start().values()]
    for p in params:
        p.grad = p.detach().clone()
    grads = [p.grad.clone() for p in params]
    torch.nn.utils.clip_grad_value_(params, limit)
    once = clipped(clip_by_value(limit), grads)
    twice = clipped(clip_by_value(limit), once)
    for p, x, y in zip(params, once, twice, strict=True):
        assert torch.equal(x, p.grad)
        assert torch.equal(x, y)


def test_clips_do_not_hide_what_is_not_finite():
    u = torch.tensor([1.0, float("nan")])
    assert clipped(clip_by_global_norm(1.0), u).isnan().all()
    assert clipped(clip_by_value(0.5), u).isnan().tolist() == [False, True]
    u = torch.tensor([1.0, float("inf")])
    assert clipped(clip_by_global_norm(1.0), u).isnan().tolist() == [False, True]


@pytest.mark.parametrize("max_norm", [0.5, 50.0])
def test_a_chain_of_clip_and_adamw(max_norm):
    tx = chain(clip_by_global_norm(max_norm), adamw(0.1))

    def clip(params: list[Tensor]) -> None:
        torch.nn.utils.clip_grad_norm_(params, max_norm)

    expected = torchs(torch.optim.AdamW, before_step=clip, lr=0.1)
    assert_same(ours(tx), expected)


def test_the_clip_sees_all_leaves_together():
    u = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    result = clipped(clip_by_global_norm(1.0), u)
    expected = tree_map(lambda x: x / 5, u)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)
