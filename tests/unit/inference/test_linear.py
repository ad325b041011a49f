# SPDX-License-Identifier: Apache-2.0
"""Large products go to oneDNN: to rounding, and with the same bits when traced."""

import functools

import pytest
import torch
import torch.nn.functional as F

import zfunc as zf
from zfunc.inference.linear import FastLinear
from zfunc.inference.options import Request
from zfunc.inference.sampling import Sampling
from zfunc.inference.step import begun, chosen, decoded, read_prompt
from zfunc.models import GPTConfig, gpt
from zfunc.program.pure import lowered, replayed

X, W, B = (torch.randn(shape) for shape in ((2, 3, 512), (512, 512), (512,)))


@pytest.mark.parametrize("bias", [None, B])
def test_it_is_linear(bias):
    with FastLinear():
        got = F.linear(X, W, bias)
    torch.testing.assert_close(got, F.linear(X, W, bias), rtol=1e-4, atol=1e-4)
    assert got.shape == (2, 3, 512)


@pytest.mark.parametrize(
    "bias", [torch.randn(1024)[::2], torch.randn(1).expand(512), torch.randn(1)]
)
@pytest.mark.parametrize("weight", [W, W.T, torch.randn(512, 1024)[:, ::2]])
def test_other_layouts_are_linear_too(weight, bias):
    for x in (X, X.transpose(0, 1), X[0, 0], X[:0], torch.randn(3, 1024)[:, ::2]):
        with FastLinear():
            got = F.linear(x, weight, bias)
        torch.testing.assert_close(got, F.linear(x, weight, bias), rtol=1e-4, atol=1e-3)


def test_errors_are_those_of_linear():
    with FastLinear(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        F.linear(X[..., :500], W)


def test_autocast_is_heeded():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = F.linear(X, W)
        with FastLinear():
            got = F.linear(X, W)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)


def calls(*args):
    """The operators that a product runs."""
    with torch.profiler.profile() as profile, FastLinear():
        F.linear(*args)
    return {event.key for event in profile.key_averages()}


def test_only_large_float32_products_go_there(monkeypatch):
    name = "mkldnn::_linear_pointwise"
    assert name in calls(X, W)
    assert name not in calls(X[..., :256], W[:, :256])
    assert name not in calls(X.double(), W.double())
    assert name not in calls(X.bfloat16(), W.bfloat16())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert name not in calls(X, W)


def test_traced_or_not_the_bits_are_the_same():
    config = GPTConfig(vocab_size=4096, d_model=64, n_layers=1, d_ff=64)
    decoder, params = zf.models.decoder(config), gpt.init(config)
    request, ids = Request(4, Sampling(), (), 0), torch.tensor([[5, 6, 7]])
    step = functools.partial(decoded, decoder, request, donate=False)
    leaves = []
    for jit in (False, True):
        logits, cache = read_prompt(
            decoder, params, ids, None, decoder.init_cache(1, 8)
        )
        state = chosen(begun(None, torch.arange(1), request), logits, cache, request)
        run = replayed(step, params, state) if jit else step
        for _ in range(3):
            state = run(params, state)
        leaves.append(zf.tree_leaves(state))
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a, b)
    names = [str(n.target) for n in lowered(step, params, state).graph.nodes]
    assert names.count("mkldnn._linear_pointwise.default") == 1


def test_a_large_parameter_in_pieces():
    config = GPTConfig(vocab_size=4096, d_model=64, n_layers=1, d_ff=64)
    decoder, params = zf.models.decoder(config), gpt.init(config)
    ids = torch.tensor([[5, 6, 7]])
    want = zf.generate(decoder, params, ids, max_new_tokens=4)
    placed = zf.shard(params, zf.make_mesh({"data": 1})).params
    for jit in (False, True):
        got = zf.generate(decoder, placed, ids, max_new_tokens=4, jit=jit)
        assert torch.equal(got.ids, want.ids)
