# SPDX-License-Identifier: Apache-2.0
"""Loss scales beside DeepSpeed's own class, where it is installed (extra ``bench``).

    python -m tests.unit.transforms.against_deepspeed

The suite compares with a state machine that was written from its description.
"""

import importlib
import random
import types

import zfunc as zf
from tests.unit.transforms.test_loss_scale import our_scales


def main() -> None:
    theirs = importlib.import_module("deepspeed.runtime.fp16.loss_scaler")
    theirs.dist = types.SimpleNamespace(get_rank=lambda: 1)  # which says nothing
    draw, equal, steps = random.Random(1), 0, 0
    for _ in range(3000):  # of scales that reach neither 1 nor 2**127
        rate = draw.choice([0.02, 0.1, 0.5, 0.9])
        overflows = [draw.random() < rate for _ in range(draw.randint(1, 60))]
        power, window = draw.randint(61, 66), draw.randint(1, 6)
        hysteresis, consecutive = draw.randint(1, 4), draw.random() < 0.5
        scaler = theirs.DynamicLossScaler(
            init_scale=2.0**power,
            scale_window=window,
            min_scale=1.0,
            delayed_shift=hysteresis,
            consecutive_hysteresis=consecutive,
            raise_error_at_min_scale=True,
            dtype=None,
        )
        rule = zf.DynamicLossScale(power, window, hysteresis, consecutive, 1.0)
        ours = list(our_scales(overflows, rule))
        scales = []
        for overflow in overflows:
            scales.append(scaler.cur_scale)
            scaler.update_scale(overflow)
        equal += ours == scales
        steps += len(scales)
    print(f"{equal} of 3000 sequences equal, {steps} steps")


if __name__ == "__main__":
    main()
