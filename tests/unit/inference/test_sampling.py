# SPDX-License-Identifier: Apache-2.0
"""Filters are those of transformers, and draws follow the distribution."""

import pytest
import torch

import zfunc as zf
from zfunc.inference.sampling import Sampling, choose, filtered, keep_top_k, keep_top_p

LOGITS = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
TIED = LOGITS.round()


def processors():
    from transformers.generation import logits_process

    return logits_process


@pytest.mark.parametrize("logits", [LOGITS, TIED])
@pytest.mark.parametrize("k", [1, 3, 49, 50, 70])
def test_top_k_is_that_of_transformers(logits, k):
    want = processors().TopKLogitsWarper(k)(None, logits)
    assert torch.equal(keep_top_k(logits, k), want)


@pytest.mark.parametrize("logits", [LOGITS, TIED])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_is_that_of_transformers(logits, p):
    want = processors().TopPLogitsWarper(p)(None, logits)
    assert torch.equal(keep_top_p(logits, p), want)


def test_filters_in_the_order_of_transformers():
    module = processors()
    want = LOGITS
    for step in (
        module.TemperatureLogitsWarper(0.7),
        module.TopKLogitsWarper(12),
        module.TopPLogitsWarper(0.8),
    ):
        want = step(None, want)
    assert torch.equal(filtered(LOGITS, Sampling(0.7, 12, 0.8)), want)


@pytest.mark.parametrize(
    "how",
    [Sampling(1.0), Sampling(0.6), Sampling(1.5, top_k=7), Sampling(1.0, None, 0.7)],
)
def test_draws_follow_the_distribution(how):
    draws = 40_000
    logits = LOGITS[:1]
    expected = filtered(logits, how).double().softmax(-1)[0] * draws
    keys = zf.random.fold_in(torch.tensor(1), torch.arange(draws))
    tokens, broken = choose(logits.expand(draws, -1), how, keys, torch.tensor(3))
    counts = torch.bincount(tokens, minlength=50).double()
    assert not broken.any()
    assert (counts[expected == 0] == 0).all()
    seen = expected >= 5
    chi = ((counts - expected)[seen].square() / expected[seen]).sum()
    freedom = int(seen.sum()) - 1
    # Within four standard deviations of chi-square's mean.
    assert abs(float(chi) - freedom) < 4 * (2 * max(freedom, 1)) ** 0.5


def test_steps_and_keys_draw_independently():
    draws = 20_000
    logits = torch.zeros(draws, 2)
    keys = zf.random.fold_in(torch.tensor(4), torch.arange(draws))
    a, b = (choose(logits, Sampling(1.0), keys, torch.tensor(s))[0] for s in (0, 1))
    c = choose(logits, Sampling(1.0), keys.roll(1), torch.tensor(0))[0]
    for other in (b, c):
        agree = float((a == other).double().mean())
        assert abs(agree - 0.5) < 4 * 0.5 / draws**0.5


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((4096, 5), -torch.inf)
    logits[:, 3] = 0.0
    keys = torch.arange(4096)
    tokens, _ = choose(logits, Sampling(1.0), keys, torch.tensor(0))
    assert (tokens == 3).all()
