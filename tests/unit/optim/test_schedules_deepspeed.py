# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's schedules against its formulas, at every step of random trainings.

The formulas are written here for one step of Python floats, with DeepSpeed's own count
``i``, the index of the last batch: -1 before the first update. The comparison with its
classes is ``python -m tests.unit.optim.against_deepspeed``.
"""

import math
import random

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from zfunc.optim import (
    lr_range_test,
    one_cycle,
    warmup_cosine_lr,
    warmup_decay_lr,
    warmup_lr,
)

SETS = 200


def draw_warmup(random_):
    return {
        "warmup_min_lr": random_.choice([0.0, random_.uniform(0, 0.1)]),
        "warmup_max_lr": random_.uniform(0.1, 2),
        "warmup_num_steps": random_.randint(1, 40),
        "warmup_type": random_.choice(["log", "linear"]),
    }


def draw_decay(random_):
    options = draw_warmup(random_)
    beyond = random_.choice([0, 1, random_.randint(0, 60)])
    return options | {"total_num_steps": options["warmup_num_steps"] + beyond}


def draw_cosine(random_):
    options = draw_decay(random_)
    del options["warmup_min_lr"], options["warmup_max_lr"]
    ratios = {
        "warmup_min_ratio": random_.choice([0.0, random_.random()]),
        "cos_min_ratio": random_.choice([0.0001, random_.random()]),
    }
    return options | ratios | {"lr": random_.uniform(1e-4, 2)}


def draw_cycle(random_):
    decay = random_.choice([0, random_.randint(1, 30)])
    return {
        "cycle_min_lr": random_.uniform(0, 0.1),
        "cycle_max_lr": random_.uniform(0.1, 2),
        "cycle_first_step_size": random_.randint(1, 40),
        "cycle_second_step_size": random_.choice([None, 0, random_.randint(1, 40)]),
        "cycle_first_stair_count": random_.choice([0, random_.randint(1, 9)]),
        "cycle_second_stair_count": random_.choice([None, 0, random_.randint(1, 9)]),
        "decay_step_size": decay,
        "decay_lr_rate": random_.uniform(0.01, 2) if decay else 0.0,
        "decay_mom_rate": random_.choice([0.0, random_.random()]) if decay else 0.0,
        "cycle_min_mom": random_.uniform(0, 0.8),
        "cycle_max_mom": random_.uniform(0.8, 0.99),
    }


def draw_range(random_):
    return {
        "lr_range_test_min_lr": random_.uniform(1e-6, 1e-2),
        "lr_range_test_step_size": random_.randint(1, 30),
        "lr_range_test_step_rate": random_.uniform(0, 50),
        "lr_range_test_staircase": random_.random() < 0.5,
    }


def warm_part(i, warmup_num_steps, warmup_type):
    """0 to 1 in the warm-up, None after it."""
    warm = max(2, warmup_num_steps)
    if i >= warm:
        return None
    i = max(i, 0)
    return math.log(i + 1) / math.log(warm) if warmup_type == "log" else i / warm


def warmup_at(i, warmup_min_lr, warmup_max_lr, **warmup):
    gamma = warm_part(i, **warmup)
    gamma = 1.0 if gamma is None else gamma
    return warmup_max_lr * gamma + warmup_min_lr * (1 - gamma)


def decay_at(i, total_num_steps, warmup_min_lr, warmup_max_lr, **warmup):
    gamma = warm_part(i, **warmup)
    if gamma is None:
        length = max(1, total_num_steps - max(2, warmup["warmup_num_steps"]))
        gamma = max(0, total_num_steps - i) / length
    return warmup_max_lr * gamma + warmup_min_lr * (1 - gamma)


def cosine_at(i, lr, total_num_steps, warmup_min_ratio, cos_min_ratio, **warmup):
    if i == -1:
        return 0.0
    gamma = warm_part(i, **warmup)
    if gamma is not None:
        return lr * (gamma + warmup_min_ratio * (1 - gamma))
    warm = max(2, warmup["warmup_num_steps"])
    done = min(1, (i + 1 - warm) / max(1, total_num_steps - warm))
    left = math.cos(math.pi * done / 2) ** 2
    return lr * (left + cos_min_ratio * (1 - left))


def height(i, options):
    """Where in the cycle i + 1 is: 0 at its ends, 1 between its halves."""
    first, second = (options[f"cycle_{h}_step_size"] for h in ("first", "second"))
    stairs, stairs2 = (options[f"cycle_{h}_stair_count"] for h in ("first", "second"))
    second = first if second is None else second
    stairs2 = stairs if stairs2 is None else stairs2
    place = (i + 1) % (first + second)
    if place <= first:
        part, size, stairs = place, first, stairs
    else:
        part, size, stairs = first + second - place, second, stairs2
    return part * stairs // size / stairs if stairs else part / size


def cycle_at(i, options):
    """The rate and the momentum."""
    first, second = (options[f"cycle_{h}_step_size"] for h in ("first", "second"))
    total = first + (first if second is None else second)
    low, high = options["cycle_min_lr"], options["cycle_max_lr"]
    least, most = options["cycle_min_mom"], options["cycle_max_mom"]
    if i < total:
        s = height(i, options)
        # Not of the formula: what the constructor sets.
        momentum = least if i == -1 else least * s + most * (1 - s)
        return high * s + low * (1 - s), momentum
    size = options["decay_step_size"]
    periods = (i + 1 - total) / size if size else 0.0
    rate = low / (1 + options["decay_lr_rate"] * periods)
    return rate, most * (1 + options["decay_mom_rate"] * periods)


def range_at(i, **options):
    x = (i + 1) / options["lr_range_test_step_size"]
    x = math.floor(x) if options["lr_range_test_staircase"] else x
    return options["lr_range_test_min_lr"] * (
        1 + options["lr_range_test_step_rate"] * x
    )


FAMILIES = {
    "warmup_lr": (warmup_lr, draw_warmup, warmup_at),
    "warmup_decay_lr": (warmup_decay_lr, draw_decay, decay_at),
    "warmup_cosine_lr": (warmup_cosine_lr, draw_cosine, cosine_at),
    "lr_range_test": (lr_range_test, draw_range, range_at),
    "one_cycle.learning_rate": (
        lambda **options: one_cycle(**options).learning_rate,
        draw_cycle,
        lambda i, **options: cycle_at(i, options)[0],
    ),
    "one_cycle.momentum": (
        lambda **options: one_cycle(**options).momentum,
        draw_cycle,
        lambda i, **options: cycle_at(i, options)[1],
    ),
}
every_family = pytest.mark.parametrize(
    ("make", "draw", "formula"), FAMILIES.values(), ids=FAMILIES.keys()
)
NUM_STEPS = 130


@every_family
def test_every_step_is_that_of_the_formula(make, draw, formula):
    random_ = random.Random(0)
    for _ in range(SETS):
        options = draw(random_)
        got = torch.vmap(make(**options))(torch.arange(NUM_STEPS))
        wanted = [formula(t - 1, **options) for t in range(NUM_STEPS)]
        expected = torch.tensor(wanted, dtype=torch.float64)
        assert got.dtype == torch.float64
        torch.testing.assert_close(
            got, expected, rtol=1e-12, atol=1e-14, msg=lambda m, o=options: f"{o}\n{m}"
        )


@every_family
def test_a_schedule_is_the_same_function_however_it_is_called(make, draw, formula):
    schedule = make(**draw(random.Random(1)))
    with torch.no_grad():
        traced = make_fx(schedule)(torch.tensor(5))
    for t in (0, 1, 2, 17, 90):
        from_int, from_tensor = schedule(t), schedule(torch.tensor(t))
        assert from_tensor.shape == ()
        assert from_tensor.dtype == torch.float64
        assert torch.equal(from_int, from_tensor)
        assert torch.equal(traced(torch.tensor(t)), from_tensor)
    assert schedule(torch.tensor(3, device="meta")).device.type == "meta"


def test_the_first_two_updates_have_the_least_rate():
    for kind in ("log", "linear"):
        rise = warmup_lr(0.25, 1.0, 10, kind)
        fall = warmup_decay_lr(20, 0.25, 1.0, 10, kind)
        assert [float(f(t)) for f in (rise, fall) for t in (0, 1)] == [0.25] * 4
        cosine = warmup_cosine_lr(1.0, 20, 0.25, 10, warmup_type=kind)
        assert [float(cosine(t)) for t in (0, 1)] == [0.0, 0.25]


def test_defaults_are_those_of_deepspeed():
    assert float(warmup_lr()(5000)) == 0.001
    assert float(warmup_lr()(999)) < 0.001
    assert float(warmup_lr()(32)) == pytest.approx(0.001 * math.log(32) / math.log(1e3))
    assert float(warmup_decay_lr(2000)(1001)) == 0.001
    assert float(warmup_cosine_lr(1.0, 2000)(2000)) == 0.0001
    assert float(lr_range_test()(2000)) == 0.002
    cycle = one_cycle(0.1, 0.5)
    assert [float(cycle.learning_rate(t)) for t in (0, 2000, 4000)] == [0.1, 0.5, 0.1]
    momenta = [float(cycle.momentum(t)) for t in (0, 2000, 4000, 9999)]
    assert momenta == pytest.approx([0.8, 0.8, 0.9, 0.9])


def test_the_momentum_may_be_left_alone():
    assert one_cycle(0.1, 0.5, cycle_momentum=False).momentum is None
