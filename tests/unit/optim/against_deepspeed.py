# SPDX-License-Identifier: Apache-2.0
"""Compare the schedules with DeepSpeed's classes, driven as its engine drives them:

python -m tests.unit.optim.against_deepspeed

Each family takes its random options from the unit tests. An optimizer of torch is given
to DeepSpeed's class; its rate (and its first beta) is read before each update, and the
scheduler is stepped after it.
"""

import importlib.metadata
import logging
import os
import random
import sys

import torch

from tests.unit.optim.test_schedules_deepspeed import FAMILIES, NUM_STEPS, SETS

NAMES = {
    "warmup_lr": "WarmupLR",
    "warmup_decay_lr": "WarmupDecayLR",
    "warmup_cosine_lr": "WarmupCosineLR",
    "lr_range_test": "LRRangeTest",
    "one_cycle.learning_rate": "OneCycle",
    "one_cycle.momentum": "OneCycle",
}
BOUND = 1e-12


def deepspeeds(make, options, momentum):
    lr = options.pop("lr", 1.0)
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=lr)
    scheduler, values = make(optimizer, **options), []
    parameter.grad = torch.zeros(1)
    group = optimizer.param_groups[0]
    for _ in range(NUM_STEPS):
        values.append(group["betas"][0] if momentum else group["lr"])
        # A decay of the momentum takes it past 1, which the optimizer refuses.
        if group["betas"][0] < 1:
            optimizer.step()
        scheduler.step()
    return torch.tensor(values, dtype=torch.float64)


def largest_difference(family, make_theirs):
    """Over all options and steps, relative to the largest value of the schedule."""
    make, draw, _ = FAMILIES[family]
    random_, largest = random.Random(0), 0.0
    for _ in range(SETS):
        options = draw(random_)
        ours = torch.vmap(make(**options))(torch.arange(NUM_STEPS))
        theirs = deepspeeds(make_theirs, options, family.endswith("momentum"))
        apart = (ours - theirs).abs().max() / theirs.abs().max()
        largest = max(largest, float(apart))
    return largest


def main():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime import lr_schedules
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    version = importlib.metadata.version("deepspeed")
    print(f"DeepSpeed {version}, {SETS} sets of options, {NUM_STEPS} steps of each")
    wrong = False
    for family, name in NAMES.items():
        apart = largest_difference(family, getattr(lr_schedules, name))
        wrong |= not apart <= BOUND
        print(f"{family:24} {name:16} largest relative difference {apart:.1e}")
    sys.exit(f"more than {BOUND:g}" if wrong else 0)


if __name__ == "__main__":
    main()
