# SPDX-License-Identifier: Apache-2.0
"""wsd, cosine, join and scaled, against torch; and what wrong options are answered."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import lr_scheduler

from zfunc.optim import (
    constant,
    cosine,
    join,
    lr_range_test,
    one_cycle,
    scaled,
    warmup_cosine,
    warmup_cosine_lr,
    warmup_decay_lr,
    warmup_linear,
    warmup_lr,
    wsd,
)


def rates_of_torch(make, peak, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


def rates(schedule, steps):
    return torch.stack([schedule(torch.tensor(step)) for step in range(steps)])


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


# --- cosine and wsd ------------------------------------------------------------------


@pytest.mark.parametrize("end", [0.0, 0.1])
def test_cosine_is_torchs_until_the_end(end):
    def make(optimizer):
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=12, eta_min=end)

    assert_close(rates(cosine(0.3, 12, end), 13), rates_of_torch(make, 0.3, 13))
    assert float(cosine(0.3, 12, end)(999)) == end


def test_wsd_is_torchs_constant_then_linear():
    def make(optimizer):
        stable = lr_scheduler.ConstantLR(optimizer, factor=1.0)
        fall = lr_scheduler.LinearLR(optimizer, 1.0, 0.2, total_iters=6)
        return lr_scheduler.SequentialLR(optimizer, [stable, fall], [9])

    schedule = wsd(0.3, 0, 6, 15, end=0.06)
    assert_close(rates(schedule, 20), rates_of_torch(make, 0.3, 20))


SHAPES = {
    "linear": lambda r: r,
    "cosine": lambda r: (1 - math.cos(math.pi * r)) / 2,
    "sqrt": lambda r: 1 - math.sqrt(1 - r),
}


@given(
    warm=st.integers(0, 9),
    stable=st.integers(0, 9),
    decay=st.integers(0, 9),
    peak=st.floats(0, 10, allow_subnormal=False),
    end=st.floats(0, 10, allow_subnormal=False),
    kind=st.sampled_from(sorted(SHAPES)),
)
def test_wsd_is_its_formula_and_exact_at_its_corners(
    warm, stable, decay, peak, end, kind
):
    total = max(1, warm + stable + decay)
    schedule = wsd(peak, warm, decay, total, end, kind)

    def at(t):
        if t < warm:
            return peak * t / warm
        left = 0.0 if t >= total else min(1.0, (total - t) / max(decay, 1))
        return end + (peak - end) * SHAPES[kind](left)

    expected = torch.tensor([at(t) for t in range(total + 4)], dtype=torch.float64)
    got = torch.vmap(schedule)(torch.arange(total + 4))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert float(schedule(0)) == (0.0 if warm else peak)
    assert all(float(schedule(t)) == peak for t in range(warm, total - decay))
    assert decay == 0 or float(schedule(total - decay)) == peak
    assert float(schedule(total)) == float(schedule(total + 7)) == end


@pytest.mark.parametrize(
    ("kind", "make"), [("linear", warmup_linear), ("cosine", warmup_cosine)]
)
def test_wsd_without_a_stable_part_is_a_warm_up_and_a_fall(kind, make):
    schedule = wsd(0.3, 4, 8, 12, 0.01, kind)
    assert torch.equal(rates(schedule, 15), rates(make(0.3, 4, 12, 0.01), 15))


# --- join and scaled -----------------------------------------------------------------


def test_join_is_torchs_sequential():
    def make(optimizer):
        parts = [
            lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_iters=4),
            lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
            lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, [4, 12])

    rise = warmup_linear(0.03, 0, 4, end=0.3)
    joined = join([rise, cosine(0.3, 8), constant(0.15)], [4, 12])
    assert_close(rates(joined, 18), rates_of_torch(make, 0.3, 18))


def test_joins_of_joins_are_joins():
    a, b, c = warmup_linear(1.0, 0, 5), lambda step: 0.5 / (step + 1), lambda step: 2
    once = join([a, b, c], [3, 7])
    for twice in (join([join([a, b], [3]), c], [7]), join([a, join([b, c], [4])], [3])):
        assert torch.equal(rates(once, 12), rates(twice, 12))


def test_a_join_of_one_is_that_one():
    assert torch.equal(rates(join([cosine(1.0, 5)], []), 7), rates(cosine(1.0, 5), 7))


def test_what_is_not_selected_does_no_harm():
    def fragile(step):
        return 1.0 / step.to(torch.float64)  # infinite at its step 0

    joined = join([fragile, constant(0.5), lambda step: float("nan")], [2, 4])
    assert rates(joined, 4).tolist() == [float("inf"), 1.0, 0.5, 0.5]


def test_scaled():
    schedule = warmup_cosine(0.3, 2, 9)
    assert torch.equal(rates(scaled(schedule, 0.5), 12), 0.5 * rates(schedule, 12))
    product = scaled(schedule, cosine(1.0, 9))
    assert torch.equal(
        rates(product, 12), rates(schedule, 12) * rates(cosine(1.0, 9), 12)
    )
    a, b = constant(1.0), cosine(1.0, 5)
    parts = join([scaled(a, 0.1), scaled(b, 0.1)], [3])
    assert torch.equal(rates(parts, 9), rates(scaled(join([a, b], [3]), 0.1), 9))


COMPOSED = [
    cosine(0.1, 9),
    wsd(0.1, 2, 3, 9, decay_type="sqrt"),
    join([warmup_lr(0.0, 0.1, 4), cosine(0.1, 9)], [4]),
    scaled(wsd(0.1, 2, 3, 9), lambda step: 2),
]


@pytest.mark.parametrize("schedule", COMPOSED)
def test_a_rate_is_a_0d_float64_however_it_is_called(schedule):
    traced = make_fx(schedule)(torch.tensor(5))
    by_step = rates(schedule, 14)
    assert by_step.dtype == torch.float64
    assert torch.equal(torch.vmap(schedule)(torch.arange(14)), by_step)
    for t in (0, 3, 6, 13):
        assert torch.equal(schedule(t), by_step[t])
        assert torch.equal(traced(torch.tensor(t)), by_step[t])
    assert schedule(torch.tensor(3, device="meta")).device.type == "meta"


# --- wrong options -------------------------------------------------------------------

CYCLE = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5}
BAD_VALUES = [
    (lambda: cosine(-1.0, 9), "cosine: peak is -1.0, .* type for example peak=3e-4"),
    (lambda: cosine(1.0, 0), "cosine: total_steps is 0, expected an int >= 1"),
    (lambda: wsd(1.0, 5, 6, 10), r"5, decay_steps is 6 and total_steps is 10.*=110"),
    (lambda: wsd(1.0, 0, 0, 1, decay_type="exp"), "'exp', expected 'linear', 'cosine'"),
    (
        lambda: wsd(1.0, 0, 0, 1, decay_type=[]),
        r"decay_type is \[\], expected 'linear'",
    ),
    (lambda: wsd(1.0, 0, -1, 1), "wsd: decay_steps is -1"),
    (lambda: warmup_lr(-1.0), "warmup_lr: warmup_min_lr is -1.0"),
    (lambda: warmup_lr(0.1), "min_lr is 0.1 and warmup_max_lr is 0.001, .*_min_lr=0.0"),
    (lambda: warmup_lr(warmup_num_steps=0), "num_steps is 0, expected an int >= 1"),
    (lambda: warmup_lr(warmup_type="cosine"), "'cosine', expected 'log' or 'linear'"),
    (lambda: warmup_lr(warmup_type=[]), r"is \[\], expected 'log' or 'linear'"),
    (
        lambda: warmup_decay_lr(99),
        "1000 and total_num_steps is 99, .* total_num_steps=10000",
    ),
    (lambda: warmup_cosine_lr(1, 0, 0, 1), "total_num_steps is 0, expected an int >="),
    (lambda: warmup_cosine_lr(-1, 1000), "warmup_cosine_lr: lr is -1, .* lr=3e-4"),
    (lambda: warmup_cosine_lr(1, 1000, 2), r"min_ratio is 2, expected .* in \[0, 1\]"),
    (lambda: warmup_cosine_lr(1, 1000, cos_min_ratio=2), "type .* cos_min_ratio=0.1"),
    (lambda: lr_range_test(0.0), r"lr_range_test_min_lr is 0.0, .* \(0, inf\)"),
    (lambda: lr_range_test(0.1, 0), "lr_range_test_step_size is 0, .*=2000"),
    (lambda: lr_range_test(0.1, 9, -1.0), "lr_range_test_step_rate is -1.0"),
    (
        lambda: one_cycle(0.5, 0.1),
        "cycle_min_lr is 0.5 and cycle_max_lr is 0.1, .*1e-3",
    ),
    (
        lambda: one_cycle(**CYCLE, cycle_min_mom=0.95),
        "cycle_min_mom is 0.95 and cycle_m",
    ),
    (lambda: one_cycle(**CYCLE, cycle_max_mom=1.0), r"max_mom is 1.0, .* \[0, 1\)"),
    (lambda: one_cycle(**CYCLE, cycle_first_step_size=0), "first_step_size is 0"),
    (lambda: one_cycle(**CYCLE, cycle_second_step_size=-1), "second_step_size is -1"),
    (lambda: one_cycle(**CYCLE, cycle_first_stair_count=-1), "first_stair_count is -1"),
    (
        lambda: one_cycle(**CYCLE, cycle_second_stair_count=-1),
        "second_stair_count is -",
    ),
    (
        lambda: one_cycle(**CYCLE, decay_lr_rate=0.1),
        "no effect without decay_step_size",
    ),
    (lambda: one_cycle(**CYCLE, decay_mom_rate=1), "0.0 and decay_mom_rate is 1.0, "),
    (lambda: one_cycle(**CYCLE, decay_step_size=9), "is 9, .* without a rate of decay"),
    (
        lambda: one_cycle(**CYCLE, cycle_momentum=False, cycle_min_mom=0.7),
        "cycle_min_mom is 0.7, which has no effect with cycle_momentum=False; leave",
    ),
    (lambda: join([], []), "got 0 schedules and 0 boundaries, .* join"),
    (lambda: join([constant(1.0)], [3]), "got 1 schedules and 1 boundaries"),
    (lambda: join([constant(1.0)] * 3, [5, 5]), r"\[5, 5\], expected each .* \[5\]"),
    (lambda: join([constant(1.0)] * 2, [0]), "boundary 0 is 0, expected an int >= 1"),
    (lambda: scaled(constant(1.0), -1), "scaled: factor is -1, .* factor=0.1"),
]
BAD_KINDS = [
    (lambda: wsd(1.0, 0.1, 1, 2), "wsd: warmup_steps is a float, expected an int"),
    (lambda: warmup_lr(None), "warmup_min_lr is a NoneType, .* warmup_min_lr=0.0"),
    (lambda: warmup_decay_lr(1e4), "total_num_steps is a float, .* type .*=10000"),
    (lambda: warmup_cosine_lr("1", 9), "warmup_cosine_lr: lr is a str"),
    (lambda: lr_range_test(0.1, 9, 1.0, 1), "staircase is a int, expected True or F"),
    (lambda: one_cycle(**CYCLE, cycle_momentum=None), "cycle_momentum is a NoneType"),
    (lambda: one_cycle(**CYCLE, cycle_first_step_size=9.0), "first_step_size is a flo"),
    (lambda: join([0.1], []), r"schedule 0 is a float, .* constant\(3e-4\)"),
    (
        lambda: join([constant(1.0)] * 2, [1.5]),
        "boundary 0 is a float, expected an int",
    ),
    (
        lambda: scaled(0.1, 0.1),
        r"schedule is a float, .* scaled\(constant\(3e-4\), 0.1",
    ),
    (lambda: scaled(constant(0.1), "2"), "scaled: factor is a str"),
    (
        lambda: join([lambda t: None], [])(3),
        "join: schedule 0 returned a NoneType, exp",
    ),
    (
        lambda: scaled(lambda t: "1", 1)(3),
        "scaled: schedule returned a str, expected a",
    ),
    (lambda: scaled(constant(1.0), lambda t: [1])(3), "scaled: factor returned a list"),
    (lambda: cosine(1.0, 9)(0.5), r"given a float, .* schedule\(0\)"),
    (lambda: join([constant(1.0)], [])(True), r"given a bool, .* schedule\(0\)"),
]


@pytest.mark.parametrize(("make", "match"), BAD_VALUES)
def test_bad_values(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(("make", "match"), BAD_KINDS)
def test_bad_kinds(make, match):
    with pytest.raises(TypeError, match=match):
        make()
