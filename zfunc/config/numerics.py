# SPDX-License-Identifier: Apache-2.0
"""Dtypes: of arithmetic, of the wire, of storage, and the scale of the loss."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Final, NamedTuple

import torch

from zfunc.config.errors import Problem, shown
from zfunc.core.sharding import is_sharded
from zfunc.core.step import Transform
from zfunc.core.tree import PyTree, leaves_with_path
from zfunc.optim.base import GradientTransformation
from zfunc.transforms.loss_scale import DynamicLossScale, StaticLossScale
from zfunc.transforms.precision import precision, skip_nonfinite

DTYPES: Final = MappingProxyType(
    {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
)


class Numerics(NamedTuple):
    """What a configuration says about numbers.

    Attributes:
      compute: "fp32", "fp16" or "bf16".
      gather_dtype: For ``partition``; None is the storage dtype.
      reduce_dtype: For ``partition``; None is the gradient's own.
      storage: For ``shard``; None keeps each leaf's.
      transforms: ``precision`` and ``skip_nonfinite``, where they are needed.
    """

    compute: str
    gather_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    storage: torch.dtype | None
    transforms: tuple[Transform, ...]


def with_masters(tx: GradientTransformation) -> GradientTransformation:
    """The optimizer, which refuses parameters that are no float32 master weights.

    Args:
      tx: The optimizer of a configuration that computes in half precision.
    """

    def init(params: PyTree) -> PyTree:
        for path, leaf in leaves_with_path(params, is_sharded):
            dtype = leaf.buffer.dtype if is_sharded(leaf) else leaf.dtype
            if dtype in (torch.bfloat16, torch.float16):
                raise TypeError(
                    f"params[{path!r}] is stored in {dtype}, and the configuration "
                    "computes in half precision on float32 master weights: pass "
                    "dtype=torch.float32 to zf.models.from_hf or to zf.shard."
                )
        return tx.init(params)

    return tx._replace(init=init)


def numerics(get: Any, stage: int, problems: list[Problem]) -> Numerics:
    """Read the sections of precision.

    Args:
      get: From a path to the value that is given, or the default.
      stage: Of ZeRO.
      problems: Gets what does not fit together.
    """
    halves = [name for name in ("fp16", "bf16") if get(f"{name}.enabled")]
    if len(halves) == 2:
        both, instead = "true, and fp16.enabled too", 'type "enabled": false in one'
        problems.append(Problem("bf16.enabled", both, "one of the two", instead))
    compute = halves[0] if halves else "fp32"
    _check_dtypes(get, compute, problems)
    wire = _wire(get, compute, problems)
    master = get("bf16.bf16_master_weights_and_grads") and compute == "bf16"
    if master and stage == 0:
        problems.append(
            Problem(
                "bf16.bf16_master_weights_and_grads",
                "true",
                "false at stage 0, as in DeepSpeed",
                'type "zero_optimization": {"stage": 1}',
            )
        )
    made: tuple[Transform, ...] = ()
    if compute == "fp16":
        made = (precision("fp16", loss_scale=_loss_scale(get, stage, problems)),)
    elif compute == "bf16":
        skips = get("bf16.check_grad_overflow") or stage == 0
        made = (precision("bf16"), *([skip_nonfinite()] if skips else []))
    narrow = DTYPES[compute] if compute != "fp32" and stage else None
    return Numerics(compute, narrow, wire, torch.bfloat16 if master else None, made)


def _loss_scale(
    get: Any, stage: int, problems: list[Problem]
) -> DynamicLossScale | StaticLossScale:
    static = get("fp16.loss_scale")
    names = ("initial_scale_power", "loss_scale_window", "consecutive_hysteresis")
    try:
        if static:
            return StaticLossScale(static)
        return DynamicLossScale(
            **{name: get(f"fp16.{name}") for name in names},
            # The optimizer that DeepSpeed has at stage 0 does not read it.
            hysteresis=get("fp16.hysteresis") if stage else 1,
            min_loss_scale=get("fp16.min_loss_scale"),
        )
    except ValueError as error:
        expected = str(error).partition(": ")[2]
        name = "loss_scale" if static else expected.partition(" ")[0]
        example = 128 if static else getattr(DynamicLossScale, name)
        path, instead = f"fp16.{name}", f'type "{name}": {example:g}'
        expected = expected.partition("; ")[0]
        problems.append(Problem(path, shown(get(path)), expected, instead))
        return DynamicLossScale()


def _check_dtypes(get: Any, compute: str, problems: list[Problem]) -> None:
    path = "data_types.grad_accum_dtype"
    if get(path) not in (None, "fp32"):
        expected, instead = '"fp32": microbatches add up in it', 'type "fp32"'
        problems.append(Problem(path, shown(get(path)), expected, instead))
    path = "data_types.param_dtype"
    if get(path) not in (None, compute):
        expected = f"{shown(compute)}, as fp16.enabled and bf16.enabled say"
        instead = "delete it, or enable the other precision"
        problems.append(Problem(path, shown(get(path)), expected, instead))


def _wire(get: Any, compute: str, problems: list[Problem]) -> torch.dtype | None:
    """What gradients travel as."""
    given = get("communication_data_type")
    name = given or ("bf16" if compute == "bf16" else "fp32")
    if name == "fp16":
        for path, default in (
            ("prescale_gradients", False),
            ("gradient_predivide_factor", 1.0),
        ):
            if get(path) != default:
                expected = f"{shown(default)} where gradients travel as fp16"
                instead = 'type "communication_data_type": "fp32"'
                problems.append(Problem(path, shown(get(path)), expected, instead))
    return DTYPES[name] if given or compute == "bf16" else None
