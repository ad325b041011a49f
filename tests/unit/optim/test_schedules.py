# SPDX-License-Identifier: Apache-2.0
"""Schedules against torch.optim.lr_scheduler and closed forms, at every step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from zfunc.optim import (
    constant,
    scale_by_learning_rate,
    warmup_cosine,
    warmup_linear,
)

MAKERS = [warmup_linear, warmup_cosine]


def rates_of_torch(make, peak, steps, **options):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler, rates = make(optimizer, **options), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


def rates(schedule, steps):
    return torch.stack([schedule(torch.tensor(step)) for step in range(steps)])


def assert_close(got, expected, peak):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14 * peak)


@pytest.mark.parametrize(("warm", "total"), [(0, 1), (0, 10), (3, 10), (10, 10)])
def test_linear_is_torchs_lambda_of_the_usual_formula(warm, total):
    def factor(t):
        if t < warm:
            return t / warm
        return max(0.0, (total - t) / max(1, total - warm))

    expected = rates_of_torch(lr_scheduler.LambdaLR, 0.3, 15, lr_lambda=factor)
    assert_close(rates(warmup_linear(0.3, warm, total), 15), expected, 0.3)


def test_linear_is_torchs_linear():
    expected = rates_of_torch(
        lr_scheduler.LinearLR, 0.3, 15, start_factor=1.0, end_factor=0.2, total_iters=9
    )
    assert_close(rates(warmup_linear(0.3, 0, 9, end=0.06), 15), expected, 0.3)


@pytest.mark.parametrize("end", [0.0, 0.01, 0.5])
def test_cosine_is_torchs_cosine_until_the_end(end):
    expected = rates_of_torch(
        lr_scheduler.CosineAnnealingLR, 0.3, 13, T_max=12, eta_min=end
    )
    schedule = warmup_cosine(0.3, 0, 12, end=end)
    assert_close(rates(schedule, 13), expected, 0.3)
    assert all(float(schedule(t)) == end for t in (12, 13, 24, 10**12))


@pytest.mark.parametrize(("warm", "total"), [(1, 5), (4, 9), (9, 9)])
def test_cosine_is_its_closed_form(warm, total):
    def rate(t):
        if t < warm:
            return 0.3 * t / warm
        done = min(1.0, (t - warm) / (total - warm)) if t < total else 1.0
        return 0.1 + 0.2 * (1 + math.cos(math.pi * done)) / 2

    expected = torch.tensor([rate(t) for t in range(15)], dtype=torch.float64)
    assert_close(rates(warmup_cosine(0.3, warm, total, end=0.1), 15), expected, 0.3)


counts = st.tuples(st.integers(0, 50), st.integers(1, 50)).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)
numbers = st.floats(0, 10, allow_subnormal=False)


@pytest.mark.parametrize("make", MAKERS)
@given(counts=counts, peak=numbers, end=numbers)
def test_documented_values_are_exact(make, counts, peak, end):
    warm, total = counts
    schedule = make(peak, warm, total, end)
    assert float(schedule(0)) == (0.0 if warm else peak)
    assert float(schedule(warm)) == peak
    assert float(schedule(total)) == float(schedule(total + 7)) == end


@pytest.mark.parametrize("make", MAKERS)
@given(counts=counts, peak=numbers)
def test_rises_to_the_peak_then_falls(make, counts, peak):
    warm, total = counts
    rate = rates(make(peak, warm, total), total + 3)
    assert (rate[: warm + 1].diff() >= 0).all()
    assert (rate[warm:].diff() <= 0).all()


def test_warm_up_alone_ends_at_the_end():
    assert float(warmup_linear(1.0, 4, 4, end=0.5)(3)) == 0.75
    assert float(warmup_linear(1.0, 4, 4, end=0.5)(4)) == 0.5


@pytest.mark.parametrize(
    "schedule", [constant(0.1), warmup_linear(0.1, 2, 9), warmup_cosine(0.1, 2, 9)]
)
def test_a_rate_is_a_0d_float64_whatever_the_step_is(schedule):
    from_int, from_tensor = schedule(3), schedule(torch.tensor(3, dtype=torch.int64))
    assert from_tensor.dtype == torch.float64
    assert from_tensor.dim() == 0
    assert torch.equal(from_int, from_tensor)
    under_vmap = torch.vmap(schedule)(torch.arange(12))
    assert torch.equal(under_vmap, rates(schedule, 12))
    assert schedule(torch.tensor(3, device="meta")).device.type == "meta"


def test_the_first_update_uses_the_rate_of_step_0():
    schedule, p = warmup_linear(1.0, 0, 4), torch.zeros(2)
    tx = scale_by_learning_rate(schedule)
    moments, used = tx.init(p), []
    for _ in range(4):
        updates, moments = tx.update(torch.ones(2), moments, p)
        used.append(-float(updates[0]))
    assert used == [1.0, 0.75, 0.5, 0.25]
    assert int(moments.count) == 4


@pytest.mark.parametrize(
    "schedule",
    [
        lambda step: 0.25,
        lambda step: torch.tensor(0.25),
        lambda step: 0.5 / (step + 2),
        lambda step: 1,
    ],
)
def test_any_function_to_a_number_is_a_schedule(schedule):
    tx, p = scale_by_learning_rate(schedule), torch.ones(2)
    updates, _ = tx.update(p, tx.init(p), p)
    assert updates.dtype == p.dtype
    assert torch.equal(updates, -float(schedule(0)) * p)


def test_a_constant_and_a_schedule_have_the_same_moments():
    p = torch.ones(2)
    moments = scale_by_learning_rate(0.1).init(p)
    updates, _ = scale_by_learning_rate(warmup_linear(1.0, 0, 1)).update(p, moments, p)
    assert torch.equal(updates, -p)
