# SPDX-License-Identifier: Apache-2.0
"""The GPT with its kernels, interpreted, is the GPT with torch's calls."""

import dataclasses
import functools

import pytest
import torch

import zfunc as zf
from zfunc.models import gpt
from zfunc.models.gpt_config import GPTConfig

LLAMA = GPTConfig(
    vocab_size=37,
    d_model=24,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    d_ff=40,
    max_seq_len=16,
    kernels="triton",
)
GPT2 = dataclasses.replace(LLAMA, norm="layer", mlp="gelu", tie_embeddings=False)
DROPPED = dataclasses.replace(LLAMA, dropout=0.25)


def _batch():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(37, (2, 10), generator=generator)
    return {"tokens": tokens, "mask": torch.rand(2, 10, generator=generator) < 0.8}


def _values(config, keys, dtype):
    loss = functools.partial(gpt.loss, config=config, remat=zf.remat)

    def total(params):
        params = zf.tree_map(lambda x: x.to(dtype), params)
        return loss(params, _batch(), keys).total

    params = gpt.init(config, dtype=torch.float64)
    return torch.func.grad_and_value(total)(params)


@pytest.mark.parametrize(
    "config", [LLAMA, GPT2, DROPPED], ids=["llama", "gpt2", "drop"]
)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)]
)
def test_losses_and_gradients(config, dtype, bound):
    keys = torch.arange(2) if config.dropout else None
    grads, value = _values(config, keys, dtype)
    reference = dataclasses.replace(config, kernels="reference")
    expected, expected_value = _values(reference, keys, dtype)
    torch.testing.assert_close(value, expected_value, rtol=bound, atol=0)
    for got, want in zip(zf.tree_leaves(grads), zf.tree_leaves(expected), strict=True):
        assert (got - want).abs().max() <= bound * want.abs().max().clamp(min=1)


def test_low_precision_differs_by_its_roundings():
    """The interpreter truncates where hardware rounds: one rounding more per value."""
    kernels, value = _values(LLAMA, None, torch.bfloat16)
    reference = dataclasses.replace(LLAMA, kernels="reference")
    plain, plain_value = _values(reference, None, torch.bfloat16)
    exact, exact_value = _values(reference, None, torch.float64)
    for got, other, want in zip(
        *map(zf.tree_leaves, (kernels, plain, exact)), strict=True
    ):
        bound = 8 * (other - want).abs().max() + 2**-8 * want.abs().max()
        assert (got - want).abs().max() <= bound
    slack = 8 * (plain_value - exact_value).abs() + 2**-8 * exact_value.abs()
    assert (value - exact_value).abs() <= slack


def test_training_as_a_program_runs_every_kernel():
    """Eager and traced steps have the same bits, and the program names the kernels."""
    loss = functools.partial(gpt.loss, config=LLAMA)
    tx = zf.optim.chain(
        zf.optim.clip_by_global_norm(1.0), zf.optim.adamw(1e-2, kernels="triton")
    )
    step = zf.train_step(loss, tx, zf.partition(zero=3))
    mesh, params = zf.make_mesh({"data": 1}), gpt.init(LLAMA)
    jitted = zf.jit(step)
    eager, traced = zf.shard(params, mesh), zf.shard(params, mesh)
    for _ in range(2):
        eager, traced = step(eager, _batch()), jitted(traced, _batch())
    for a, b in zip(zf.tree_leaves(eager), zf.tree_leaves(traced), strict=True):
        assert torch.equal(a, b)
    text = jitted.lower(traced, _batch()).as_text()
    for name in ("rms_norm", "rope", "swiglu", "cross_entropy", "adamw_"):
        assert f"zfunc.{name}" in text, name


def test_a_backend_that_compiles_leaves_kernels_alone():
    loss = functools.partial(gpt.loss, config=dataclasses.replace(LLAMA, n_layers=1))
    step = zf.train_step(loss, zf.optim.adamw(1e-2, kernels="triton"))
    mesh = zf.make_mesh({"data": 1})
    params = gpt.init(dataclasses.replace(LLAMA, n_layers=1))
    eager = step(zf.shard(params, mesh), _batch())
    compiled = zf.jit(step, backend="inductor")(zf.shard(params, mesh), _batch())
    for a, b in zip(zf.tree_leaves(eager), zf.tree_leaves(compiled), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_unknown_choice_is_an_error():
    with pytest.raises(ValueError, match=r"GPTConfig: kernels='fast', expected one of"):
        GPTConfig(kernels="fast")
