# SPDX-License-Identifier: Apache-2.0
"""What each key became, with the values around it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from zfunc.config.checking import AUTO, OFF, Checked, Entry
from zfunc.config.keys import SUPPORTED, Key
from zfunc.config.keys_training import BATCH
from zfunc.config.keys_zero import ZERO
from zfunc.config.numerics import Numerics
from zfunc.config.table import KEYS

_DYNAMIC: Final = frozenset(
    f"fp16.{name}"
    for name in (
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
    )
)
_AT_STAGES: Final = MappingProxyType(
    {
        f"{ZERO}reduce_bucket_size": (0, 1, 2, 3),
        f"{ZERO}allgather_bucket_size": (1, 2),
        f"{ZERO}stage3_prefetch_bucket_size": (3,),
        f"{ZERO}stage3_param_persistence_threshold": (3,),
        f"{ZERO}stage3_max_live_parameters": (3,),
        f"{ZERO}stage3_max_reuse_distance": (3,),
    }
)
# Without a value in the file they are not used: zf.jit has sizes of its own.
_ONLY_GIVEN: Final = frozenset(_AT_STAGES) - {
    f"{ZERO}stage3_param_persistence_threshold"
}


_SAID: Final = frozenset({*BATCH, "communication_data_type"})


class Context(NamedTuple):
    """What the effect of a key depends on.

    Attributes:
      stage: Of ZeRO.
      numbers: Dtypes.
      gather_bytes: Of an element on the wire.
      reduce_bytes: Of an element on the wire.
      is_static: Whether the loss scale is a number.
      lr_is_read: Whether the optimizer's own rate is.
      sizes: The three batch sizes, by path.
    """

    stage: int
    numbers: Numerics
    gather_bytes: int
    reduce_bytes: int
    is_static: bool
    lr_is_read: bool
    sizes: Mapping[str, int]


def explained(checked: Checked, context: Context) -> tuple[Entry, ...]:
    """The entries of a configuration, with what their values became.

    Args:
      checked: The configuration.
      context: What it depends on.
    """
    made = []
    for entry in checked.entries:
        note = entry.note
        if entry.path in BATCH and entry.path in checked.autos:
            note = "auto: inferred from the others"
        value = checked.values.get(entry.path)
        if value is None and entry.value in (AUTO, None) and entry.path in KEYS:
            value = KEYS[entry.path].default
        made.append(_effect(entry._replace(note=note), value, context))
    return tuple(made)


def defaults_of(
    checked: Checked, context: Context, parameters: tuple[tuple[Key, Any], ...]
) -> tuple[Entry, ...]:
    """Entries for what is not given and matters all the same.

    Args:
      checked: The configuration.
      context: What it depends on.
      parameters: Those of the optimizer and the schedule, with their defaults.
    """
    there = {entry.path for entry in checked.entries}
    rows = [
        Entry(key.path, key.default, SUPPORTED, key.note)
        for key in KEYS.values()
        if key.status == SUPPORTED and key.path not in _ONLY_GIVEN
    ]
    rows += [Entry(key.path, value, SUPPORTED, key.note) for key, value in parameters]
    made = [_effect(row, row.value, context) for row in rows if row.path not in there]
    return tuple(row for row in made if row.status == SUPPORTED and _matters(row))


def _matters(row: Entry) -> bool:
    """Whether it says anything that a default is not given."""
    return row.path in _SAID or not (row.value is None or row.value is False)


def _effect(entry: Entry, value: Any, context: Context) -> Entry:
    """An entry with its value put into what it became, or why it became nothing."""
    if entry.status != SUPPORTED:
        return entry
    why = _why_nothing(entry.path, context)
    if why:
        return entry._replace(status=OFF, became=f"nothing: {why}")
    return entry._replace(became=_became(entry, value, context))


def _why_nothing(path: str, context: Context) -> str:
    section, _, name = path.partition(".")
    if section in ("fp16", "bf16") and name != "enabled":
        if context.numbers.compute != section:
            return f"{section}.enabled is false"
        if path in _DYNAMIC and context.is_static:
            return "fp16.loss_scale is static"
    if path == "optimizer.params.lr" and not context.lr_is_read:
        return "the scheduler says the rate"
    if context.stage not in _AT_STAGES.get(path, (context.stage,)):
        return f"the stage is {context.stage}"
    return ""


def _became(entry: Entry, value: Any, context: Context) -> str:
    match entry.path.rpartition(".")[2]:
        case "train_batch_size":
            return f"data.train_batch_size={context.sizes[entry.path]}"
        case "train_micro_batch_size_per_gpu":
            return f"data.micro_batch_size={context.sizes[entry.path]}"
        case "gradient_accumulation_steps":
            return f"zf.accumulate({context.sizes[entry.path]})"
        case "gradient_clipping" if value:
            return f"zf.optim.clip_by_global_norm({value})"
        case "gradient_clipping":
            return "no clipping"
        case "communication_data_type":
            return f"zf.partition(reduce_dtype={context.numbers.reduce_dtype})"
        case "stage" if value == 0:
            return "zf.partition(zero=0), zf.shard(spec=zf.P())"
        case "stage":
            return f"zf.partition(zero={value})"
        case "reduce_bucket_size" if entry.value != AUTO:
            return f"bucket(bucket_bytes={value * context.reduce_bytes}) or less"
        case "allgather_bucket_size" if entry.value != AUTO:
            return f"bucket(bucket_bytes={value * context.gather_bytes}) or less"
        case "stage3_prefetch_bucket_size" if value == 0:
            return "prefetch(gathers=0)"
        case "stage3_prefetch_bucket_size" if entry.value != AUTO:
            return f"bucket(bucket_bytes={value * context.gather_bytes}) or less"
        case "stage3_max_live_parameters" | "stage3_max_reuse_distance":
            if entry.value != AUTO:
                size = value * context.gather_bytes
                return f"keep_small(small_bytes={size}) or less"
        case "hysteresis" if context.stage == 0:
            return "zf.DynamicLossScale(hysteresis=1): stage 0 does not read it"
        case "enabled" if not value:
            return "nothing: it is off"
    if entry.path in _ONLY_GIVEN:
        return "the default size of zf.jit"
    return entry.became.replace("`", "").replace("=...", f"={value!r}")
