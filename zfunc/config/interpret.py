# SPDX-License-Identifier: Apache-2.0
"""From a DeepSpeed configuration to an optimizer, transformations and options."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zfunc.config.batch import DataOptions, batch_sizes, check_count, check_world
from zfunc.config.checking import Checked, Entry, check
from zfunc.config.effects import Context, defaults_of, explained
from zfunc.config.errors import ConfigError
from zfunc.config.keys_training import BATCH
from zfunc.config.keys_zero import ZERO
from zfunc.config.numerics import Numerics, numerics, with_masters
from zfunc.config.programs import jit_options
from zfunc.config.reading import read
from zfunc.config.schedules import TOTAL
from zfunc.config.table import KEYS
from zfunc.config.updates import Update, make_update
from zfunc.core.sharding import P
from zfunc.core.step import Transform
from zfunc.optim.base import GradientTransformation
from zfunc.optim.schedules import Schedule
from zfunc.transforms.accumulate import accumulate
from zfunc.transforms.partition import partition

Source = Mapping[str, Any] | str | Path
# A whole optimizer, or one that is made from the schedule.
ClientOptimizer = GradientTransformation | Callable[[Schedule], GradientTransformation]


class Configured(NamedTuple):
    """What ``zf.train_step``, ``zf.jit`` and a data loader are called with.

    Attributes:
      tx: The whole optimizer: clipping, update, schedule.
      transforms: For ``zf.train_step``, after ``tx``.
      jit: Keyword arguments of ``zf.jit``.
      data: Batch sizes.

    Examples:
      >>> config = {"train_batch_size": 8, "optimizer": {"type": "SGD"}}
      >>> from_ds_config(config, world=2).data.micro_batch_size
      4
    """

    tx: GradientTransformation
    transforms: tuple[Transform, ...]
    jit: dict[str, Any]
    data: DataOptions


class Interpretation(NamedTuple):
    """All that a configuration means.

    Attributes:
      tx: The whole optimizer: clipping, update, schedule.
      transforms: For ``zf.train_step``, after ``tx``.
      jit: Keyword arguments of ``zf.jit``.
      data: Batch sizes.
      schedule: From the step, which counts the updates before it, to the rate.
      shard: Keyword arguments of ``zf.shard``: ``spec``, ``dtype``.
      stage: Of ZeRO.
      precision: "fp32", "fp16" or "bf16".
      clipping: The bound of the norm of the gradient; 0.0 is none.
      entries: One for each key that is given: what it became.
      defaults: The same of keys that are not given and matter all the same.
      notes: What is worth reading.

    Examples:
      >>> config = {"train_batch_size": 8, "optimizer": {"type": "SGD"}}
      >>> made = interpret(config, world=1)
      >>> made.stage, made.shard, made.clipping
      (0, {'spec': P()}, 1.0)
    """

    tx: GradientTransformation
    transforms: tuple[Transform, ...]
    jit: dict[str, Any]
    data: DataOptions
    schedule: Schedule
    shard: dict[str, Any]
    stage: int
    precision: str
    clipping: float
    entries: tuple[Entry, ...]
    defaults: tuple[Entry, ...]
    notes: tuple[str, ...]


def from_ds_config(
    source: Source,
    *,
    world: int | None = None,
    auto: Mapping[str, Any] | None = None,
    total_steps: int | None = None,
    optimizer: ClientOptimizer | None = None,
) -> Configured:
    """A DeepSpeed configuration as the arguments of a training step.

    Args:
      source: A dict, the path of a JSON file (comments are read), or such a file in
        URL-safe base64.
      world: Data-parallel ranks; default: the environment's ``WORLD_SIZE``, else 1.
      auto: Values for keys that say "auto", by their path, as
        ``{"optimizer.params.lr": 3e-4}``. Others that say "auto" have DeepSpeed's
        default. A key that says something else than its value here is an error, and one
        that is not in the configuration is not put there, both as in transformers.
      total_steps: Updates of the whole training, for a schedule whose
        ``total_num_steps`` says "auto" or is not there.
      optimizer: Of a configuration without one: a ``GradientTransformation``, or a
        function of the schedule, as ``lambda rate: zf.optim.adamw(rate)``.

    Returns:
      ``tx, transforms, jit, data``. (``zfunc.config.interpret`` has more: the schedule,
      arguments for ``zf.shard``, and what each key became.)

    Raises:
      ConfigError: Everything that is wrong, at once: keys that do not exist, with the
        nearest ones that do; wrong types and ranges; features that are switched on and
        not here; batch sizes that do not fit; "auto" without a value.
      TypeError: Another argument of the wrong kind.
      ValueError: Another argument out of its range.

    Laws:
      The step is that of the same transformations written by hand, bitwise. Learning
      rates are DeepSpeed's at every step, to rounding of float64; a step that
      overflows does not advance them.

    Differs from:
      DeepSpeed ignores keys at the top that it does not know, and infers batch sizes
      with a remainder before it fails. As there, ``gradient_clipping`` is 1.0 where it
      is not given, and gradients travel in bfloat16 with ``bf16``; with ``fp16`` they
      travel in float32 here, since sums are divided after they were sent.

    Examples:
      >>> import zfunc as zf
      >>> config = {
      ...     "train_batch_size": 8,
      ...     "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
      ...     "zero_optimization": {"stage": 2},
      ... }
      >>> tx, transforms, jit, data = zf.from_ds_config(config)
      >>> step = zf.jit(
      ...     zf.train_step(lambda p, b: (p * b).sum(), tx, *transforms), **jit
      ... )
      >>> state = step(
      ...     zf.shard(torch.ones(2), zf.make_mesh({"data": 1})), torch.ones(2)
      ... )
      >>> zf.from_ds_config({"train_batch_size": 8, "optimiser": {"type": "AdamW"}})
      Traceback (most recent call last):
      zfunc.config.errors.ConfigError: the dict cannot be used, 2 problems:
        optimiser: got {"type": "AdamW"}, expected a key that exists; type "optimizer"
        optimizer: got nothing, expected an optimizer; type "optimizer": {"type": ...
    """
    made = interpret(
        source, world=world, auto=auto, total_steps=total_steps, optimizer=optimizer
    )
    return Configured(made.tx, made.transforms, made.jit, made.data)


def interpret(
    source: Source,
    *,
    world: int | None = None,
    auto: Mapping[str, Any] | None = None,
    total_steps: int | None = None,
    optimizer: ClientOptimizer | None = None,
) -> Interpretation:
    """All that a DeepSpeed configuration means; see ``from_ds_config``.

    Args:
      source: As of ``from_ds_config``.
      world: As of ``from_ds_config``.
      auto: As of ``from_ds_config``.
      total_steps: As of ``from_ds_config``.
      optimizer: As of ``from_ds_config``.

    Raises:
      ConfigError: As of ``from_ds_config``.

    Examples:
      >>> config = {"train_batch_size": 8, "optimizer": {"type": "SGD"}}
      >>> float(interpret(config, world=1).schedule(0))
      0.001
    """
    name, raw = read(source)
    ranks = check_world(_environments_world() if world is None else world)
    values = _auto(auto, total_steps)
    checked = check(raw, values)
    problems = list(checked.problems)

    def get(path: str) -> Any:
        return checked.values.get(path, KEYS[path].default)

    data = batch_sizes(checked, ranks, problems)
    stage = get(f"{ZERO}stage")
    numbers = numerics(get, stage, problems)
    update = make_update(
        checked, get("gradient_clipping"), total_steps, optimizer, problems
    )
    if problems or update is None:
        raise ConfigError(name, problems)
    return _interpretation(checked, data, stage, numbers, update)


def _interpretation(
    checked: Checked, data: DataOptions, stage: int, numbers: Numerics, update: Update
) -> Interpretation:
    threshold = KEYS[f"{ZERO}stage3_param_persistence_threshold"]
    options: dict[str, Any] = {}
    if stage == 3:
        options["persistence_threshold"] = checked.values.get(
            threshold.path, threshold.default
        )
    placed = partition(
        stage,  # type: ignore[arg-type] # it is one of the four
        gather_dtype=numbers.gather_dtype,
        reduce_dtype=numbers.reduce_dtype,
        **options,
    )
    steps = data.accumulation_steps
    split = (accumulate(steps),) if steps > 1 else ()
    shard: dict[str, Any] = {} if stage else {"spec": P()}
    if numbers.storage is not None:
        shard["dtype"] = numbers.storage
    gather_bytes, reduce_bytes = (
        (dtype or torch.float32).itemsize
        for dtype in (numbers.gather_dtype, numbers.reduce_dtype)
    )
    has_masters = numbers.compute != "fp32" and numbers.storage is None
    sizes = data.train_batch_size, data.micro_batch_size, data.accumulation_steps
    context = Context(
        stage,
        numbers,
        gather_bytes,
        reduce_bytes,
        bool(checked.values.get("fp16.loss_scale")),
        update.lr_is_read,
        dict(zip(BATCH, sizes, strict=True)),
    )
    return Interpretation(
        tx=with_masters(update.tx) if has_masters else update.tx,
        transforms=(placed, *numbers.transforms, *split),
        jit=jit_options(checked.values, stage, gather_bytes, reduce_bytes),
        data=data,
        schedule=update.schedule,
        shard=shard,
        stage=stage,
        precision=numbers.compute,
        clipping=update.clipping,
        entries=explained(checked, context),
        defaults=defaults_of(checked, context, update.defaults),
        notes=(*checked.notes, *update.notes),
    )


def _environments_world() -> int:
    given = os.environ.get("WORLD_SIZE", "1")
    try:
        return int(given)
    except ValueError:
        raise ValueError(
            f"from_ds_config: the environment has WORLD_SIZE={given!r}, expected the "
            "number of ranks; unset it, or type for example world=2"
        ) from None


def _auto(auto: Mapping[str, Any] | None, total_steps: int | None) -> dict[str, Any]:
    if auto is not None and not isinstance(auto, Mapping):
        raise TypeError(
            f"from_ds_config: auto is a {type(auto).__name__}, expected a dict of "
            'values by path; type for example auto={"optimizer.params.lr": 3e-4}'
        )
    values = dict(auto or {})
    for path in values:
        if not isinstance(path, str):
            raise TypeError(
                f"from_ds_config: auto has the key {path!r}, expected the path of a "
                'key; type for example auto={"optimizer.params.lr": 3e-4}'
            )
    if total_steps is None:
        return values
    check_count("total_steps", total_steps, "a number of updates", 1000)
    return {TOTAL: total_steps, **values}
