# SPDX-License-Identifier: Apache-2.0
"""The section ``scheduler``: DeepSpeed's schedules, as functions of the step."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from zfunc.config.keys import Key, refused, supported
from zfunc.config.kinds import (
    ANY_INTEGER,
    BELOW_ONE,
    BOOL,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    RATE,
    RATIO,
    Kind,
    one_of,
)
from zfunc.optim.schedule_one_cycle import one_cycle
from zfunc.optim.schedule_range_test import lr_range_test
from zfunc.optim.schedule_warmup import (
    warmup_cosine_lr,
    warmup_decay_lr,
    warmup_lr,
)
from zfunc.optim.schedules import Schedule, constant

PARAMS: Final = "scheduler.params."
TOTAL: Final = f"{PARAMS}total_num_steps"
REQUIRED: Final = "required"


class Rates(NamedTuple):
    """The schedules of an optimizer.

    Attributes:
      learning_rate: Of the step, which counts the updates before it.
      momentum: Of Adam's first beta, or None.
    """

    learning_rate: Schedule
    momentum: Schedule | None = None


def _params(function: str, *options: tuple[str, Kind, Any]) -> tuple[Key, ...]:
    """The parameters of a scheduler, which are arguments of a function here."""
    return (
        *(
            supported(f"{PARAMS}{name}", kind, default, f"`{function}({name}=...)`")
            for name, kind, default in options
        ),
        refused(
            f"{PARAMS}last_batch_iteration",
            ANY_INTEGER,
            -1,
            "the count of updates is in the state: type -1 and restore a checkpoint",
        ),
    )


_WARMUP: Final = (
    ("warmup_num_steps", POSITIVE, 1000),
    ("warmup_type", one_of("log", "linear"), "log"),
)
SCHEDULERS: Final[Mapping[str, tuple[Key, ...]]] = MappingProxyType(
    {
        "WarmupLR": _params(
            "zf.optim.warmup_lr",
            ("warmup_min_lr", RATE, 0.0),
            ("warmup_max_lr", RATE, None),
            *_WARMUP,
        ),
        "WarmupDecayLR": _params(
            "zf.optim.warmup_decay_lr",
            ("total_num_steps", POSITIVE, REQUIRED),
            ("warmup_min_lr", RATE, 0.0),
            ("warmup_max_lr", RATE, 0.001),
            *_WARMUP,
        ),
        "WarmupCosineLR": _params(
            "zf.optim.warmup_cosine_lr",
            ("total_num_steps", POSITIVE, REQUIRED),
            ("warmup_min_ratio", RATIO, 0.0),
            ("cos_min_ratio", RATIO, 0.0001),
            *_WARMUP,
        ),
        "OneCycle": _params(
            "zf.optim.one_cycle",
            ("cycle_min_lr", RATE, REQUIRED),
            ("cycle_max_lr", RATE, REQUIRED),
            ("decay_lr_rate", NOT_NEGATIVE, 0.0),
            ("cycle_first_step_size", POSITIVE, 2000),
            ("cycle_second_step_size", COUNT, None),
            ("cycle_first_stair_count", COUNT, 0),
            ("cycle_second_stair_count", COUNT, None),
            ("decay_step_size", COUNT, 0),
            ("cycle_momentum", BOOL, True),
            ("cycle_min_mom", BELOW_ONE, 0.8),
            ("cycle_max_mom", BELOW_ONE, 0.9),
            ("decay_mom_rate", NOT_NEGATIVE, 0.0),
        ),
        "LRRangeTest": _params(
            "zf.optim.lr_range_test",
            ("lr_range_test_min_lr", RATE, 0.001),
            ("lr_range_test_step_size", POSITIVE, 2000),
            ("lr_range_test_step_rate", NOT_NEGATIVE, 1.0),
            ("lr_range_test_staircase", BOOL, False),
        ),
    }
)
# Of torch.optim.lr_scheduler, which DeepSpeed falls back to.
HINTS: Final = MappingProxyType(
    {
        "CosineAnnealingLR": "WarmupCosineLR",
        "LinearLR": "WarmupLR",
        "ConstantLR": "WarmupLR",
        "OneCycleLR": "OneCycle",
        "CyclicLR": "OneCycle",
    }
)
# Schedules that decide the rate alone: the optimizer's own is not read.
ABSOLUTE: Final = frozenset({"WarmupDecayLR", "OneCycle", "LRRangeTest"})


def make_rates(name: str | None, params: Mapping[str, Any], lr: float) -> Rates:
    """The schedules of a section ``scheduler``.

    Args:
      name: Its type; None is a constant rate.
      params: All parameters of the type, with their defaults.
      lr: The optimizer's own rate.

    Raises:
      ValueError: Parameters that do not fit together, from ``zfunc.optim``.

    Examples:
      >>> rates = make_rates(None, {}, 0.5)
      >>> float(rates.learning_rate(7))
      0.5
    """
    options = {k: v for k, v in params.items() if k != "last_batch_iteration"}
    match name:
        case None:
            return Rates(constant(lr))
        case "WarmupLR":
            if options["warmup_max_lr"] is None:
                options["warmup_max_lr"] = lr
            return Rates(warmup_lr(**options))
        case "WarmupDecayLR":
            return Rates(warmup_decay_lr(**options))
        case "WarmupCosineLR":
            return Rates(warmup_cosine_lr(lr, **options))
        case "LRRangeTest":
            return Rates(lr_range_test(**options))
    return _cycle(options)


def _cycle(options: dict[str, Any]) -> Rates:
    """``one_cycle`` without the options that DeepSpeed reads and does not use."""
    used = dict(options)
    if not used["cycle_momentum"]:
        for name in ("cycle_min_mom", "cycle_max_mom", "decay_mom_rate"):
            used.pop(name)
    if not used["decay_step_size"]:
        used["decay_lr_rate"] = 0.0
        used.pop("decay_mom_rate", None)
    if not used["decay_lr_rate"] and not used.get("decay_mom_rate"):
        used["decay_step_size"] = 0
    cycle = one_cycle(**used)
    return Rates(cycle.learning_rate, cycle.momentum)
