# SPDX-License-Identifier: Apache-2.0
"""The sections ``optimizer`` and ``scheduler`` together: clipping, update, rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from zfunc.config.checking import Checked
from zfunc.config.errors import Problem
from zfunc.config.keys import SUPPORTED, Key
from zfunc.config.optimizers import OPTIMIZERS
from zfunc.config.optimizers import PARAMS as OPTIMIZER
from zfunc.config.schedules import (
    ABSOLUTE,
    REQUIRED,
    SCHEDULERS,
    TOTAL,
    Rates,
    make_rates,
)
from zfunc.config.schedules import PARAMS as SCHEDULER
from zfunc.optim.base import GradientTransformation, chain
from zfunc.optim.clip import clip_by_global_norm
from zfunc.optim.schedules import Schedule, constant

_MUON_REST_LR: Final = 3e-4
_TORCH_ADAMW_DECAY: Final = 0.01


class Update(NamedTuple):
    """An optimizer that was made.

    Attributes:
      tx: With clipping before it.
      schedule: Its rate.
      clipping: The bound of the norm; 0.0 is none.
      notes: What is worth reading.
      lr_is_read: Whether the optimizer's own rate is.
      defaults: Keys and values of parameters that are not given.
    """

    tx: GradientTransformation
    schedule: Schedule
    clipping: float
    notes: tuple[str, ...]
    lr_is_read: bool
    defaults: tuple[tuple[Key, Any], ...]


def make_update(
    checked: Checked,
    clipping: float,
    total_steps: int | None,
    client: Any,
    problems: list[Problem],
) -> Update | None:
    """The optimizer of a configuration, or None where there is a problem with it.

    Args:
      checked: The configuration.
      clipping: The bound of the norm of the gradient; 0 is none.
      total_steps: For a schedule that does not say its own.
      client: An optimizer from the caller, or a function of the schedule, or None.
      problems: Gets those of the two sections.
    """
    name = checked.values.get("optimizer.type")
    wrong = {p.path.partition(".")[0] for p in checked.problems}
    scheduler = checked.values.get("scheduler.type")
    params = _with_defaults(OPTIMIZERS[name].keys if name else (), checked)
    rates_of = _with_defaults(SCHEDULERS[scheduler] if scheduler else (), checked)
    if rates_of.get("total_num_steps") == REQUIRED and total_steps is not None:
        rates_of["total_num_steps"] = total_steps
    _check_required(SCHEDULERS[scheduler] if scheduler else (), rates_of, problems)
    missing = _check_client(checked, name, client, wrong, problems)
    if missing or problems or {"optimizer", "scheduler"} & wrong:
        return None
    notes = _notes(name, scheduler, params, rates_of, total_steps)
    try:
        schedule, tx = _made(name, params, scheduler, rates_of, client)
    except (TypeError, ValueError) as error:
        problems.append(_fitting(error, scheduler))
        return None
    if tx is None:
        tx = _clients(client, schedule)
    if clipping:
        tx = chain(clip_by_global_norm(clipping), tx)
    keys = (
        *(OPTIMIZERS[name].keys if name else ()),
        *(SCHEDULERS[scheduler] if scheduler else ()),
    )
    values = {**_effective(name, params), **rates_of} if name else rates_of
    defaults = tuple(
        (key, values[key.path.rpartition(".")[2]])
        for key in keys
        if key.status == SUPPORTED and key.path not in checked.values
    )
    is_read = not _is_absolute(scheduler, rates_of)
    return Update(tx, schedule, clipping, notes, is_read, defaults)


def _made(
    name: str | None,
    params: dict[str, Any],
    scheduler: str | None,
    rates_of: dict[str, Any],
    client: Any,
) -> tuple[Schedule, GradientTransformation | None]:
    """The schedule, and the optimizer of the configuration if there is one."""
    if name is None:
        if isinstance(client, GradientTransformation):
            return constant(0.0), None
        return make_rates(scheduler, rates_of, 0.0).learning_rate, None
    used = _effective(name, params)
    rates = make_rates(scheduler, rates_of, used["lr"])
    if rates.momentum is not None and not OPTIMIZERS[name].has_betas:
        rates = Rates(rates.learning_rate)  # as DeepSpeed does, with a warning
    rest = rates.learning_rate
    if name == "Muon":
        rest = make_rates(scheduler, rates_of, used["rest_lr"]).learning_rate
    return rates.learning_rate, OPTIMIZERS[name].make(used, rates, rest)


def _clients(client: Any, schedule: Schedule) -> GradientTransformation:
    """The optimizer from the caller, whose own errors are the caller's."""
    if isinstance(client, GradientTransformation):
        return client
    made = client(schedule)
    if not isinstance(made, GradientTransformation):
        raise TypeError(
            f"from_ds_config: optimizer returned a {type(made).__name__}, expected a "
            "GradientTransformation; type for example "
            "optimizer=lambda rate: zf.optim.adamw(rate)"
        )
    return made


def _effective(name: str, params: dict[str, Any]) -> dict[str, Any]:
    """Defaults that depend on other parameters."""
    used = dict(params)
    if name == "AdamW":
        used["adam_w_mode"] = True
    if name in ("Adam", "AdamW") and used.pop("weight_decay_default"):
        torchs = used["torch_adam"] and used["adam_w_mode"]
        used["weight_decay"] = _TORCH_ADAMW_DECAY if torchs else 0.0
    if name == "Muon":
        shared = None if used["lr_default"] else used["lr"]
        first = used["muon_lr"]
        used["lr"] = used["lr"] if first is None else first
        rest = used["adam_lr"] if used["adam_lr"] is not None else shared
        used["rest_lr"] = _MUON_REST_LR if rest is None else rest
    return used


def _with_defaults(keys: Iterable[Key], checked: Checked) -> dict[str, Any]:
    """All parameters by their names, and which of two are defaults."""
    found: dict[str, Any] = {}
    for key in keys:
        if key.status == SUPPORTED:
            found[key.path.rpartition(".")[2]] = checked.values.get(
                key.path, key.default
            )
    for name in ("lr", "weight_decay"):
        if name in found:
            found[f"{name}_default"] = f"{OPTIMIZER}{name}" not in checked.values
    return found


def _check_required(
    keys: Iterable[Key], params: dict[str, Any], problems: list[Problem]
) -> None:
    for key in keys:
        name = key.path.rpartition(".")[2]
        if key.default == REQUIRED and params.get(name) == REQUIRED:
            if any(problem.path == key.path for problem in problems):
                continue
            instead = f'type "{name}": {key.kind.example}'
            if key.path == TOTAL:
                instead = (
                    "type total_steps=1000 (in a shell --total-steps 1000), or "
                    '"total_num_steps": 1000'
                )
            problems.append(Problem(key.path, "nothing", key.kind.words, instead))


def _check_client(
    checked: Checked,
    name: str | None,
    client: Any,
    wrong: set[str],
    problems: list[Problem],
) -> bool:
    """Whether there is no optimizer, or more than one."""
    is_whole = isinstance(client, GradientTransformation)
    if client is not None and not is_whole and not callable(client):
        raise TypeError(
            f"from_ds_config: optimizer is a {type(client).__name__}, expected a "
            "GradientTransformation or a function of the schedule; type for example "
            "optimizer=lambda rate: zf.optim.adamw(rate)"
        )
    path = "optimizer"
    if name is None and client is None and path not in wrong:
        instead = f'type "{path}": {{"type": "AdamW", "params": {{"lr": 3e-4}}}}'
        problems.append(Problem(path, "nothing", "an optimizer", instead))
    elif name is not None and client is not None:
        both, instead = "one here and one from the caller", "delete one of them"
        problems.append(Problem(path, both, "one", instead))
    elif is_whole and "scheduler.type" in checked.values:
        got = "a schedule, and a whole optimizer from the caller"
        instead = "type optimizer=lambda rate: zf.optim.adamw(rate)"
        problems.append(Problem("scheduler", got, "a rate that is used", instead))
    elif name is None and client is not None and not is_whole:
        return _check_rate(checked, problems)
    return name is None and client is None


def _check_rate(checked: Checked, problems: list[Problem]) -> bool:
    scheduler = checked.values.get("scheduler.type")
    needs = scheduler not in ABSOLUTE and not (
        scheduler == "WarmupLR" and f"{SCHEDULER}warmup_max_lr" in checked.values
    )
    if needs:
        got = f"{scheduler}" if scheduler else "nothing"
        instead = 'type {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-4}}'
        expected = "a schedule that says its rate, for the optimizer from the caller"
        problems.append(Problem("scheduler", got, expected, instead))
    return needs


def _fitting(error: Exception, scheduler: str | None) -> Problem:
    """A problem of parameters that are right one by one, from ``zfunc.optim``."""
    what, _, rest = str(error).partition(": ")
    section = "scheduler" if scheduler and what.startswith(_SCHEDULES) else "optimizer"
    got, _, then = rest.partition(", expected ")
    expected, _, instead = then.partition("; ")
    if not expected:
        got, expected, instead = "parameters", str(error), "change one of them"
    return Problem(f"{section}.params", got, expected, instead or "change one of them")


_SCHEDULES: Final = ("warmup_", "one_cycle", "lr_range_test")


def _is_absolute(scheduler: str | None, rates_of: dict[str, Any]) -> bool:
    """Whether the schedule does not depend on the optimizer's own rate."""
    return scheduler in ABSOLUTE or rates_of.get("warmup_max_lr") is not None


def _notes(
    name: str | None,
    scheduler: str | None,
    params: dict[str, Any],
    rates_of: dict[str, Any],
    total_steps: int | None,
) -> tuple[str, ...]:
    notes = []
    if _is_absolute(scheduler, rates_of) and name and not params["lr_default"]:
        notes.append(f"optimizer.params.lr is not read: {scheduler} says the rate.")
    if name == "Adam" and params["adam_w_mode"]:
        notes.append("Adam decays as AdamW does: adam_w_mode is true.")
    if scheduler in ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR"):
        notes.append("The first two updates have the lowest rate, as in DeepSpeed.")
    if scheduler == "OneCycle" and rates_of["cycle_momentum"] and name:
        if OPTIMIZERS[name].has_betas:
            notes.append("OneCycle sets Adam's second beta to 0.99, as in DeepSpeed.")
        else:
            notes.append(f"OneCycle cycles no momentum of {name}, as in DeepSpeed.")
    if total_steps is not None and "total_num_steps" not in rates_of:
        notes.append("total_steps is not read: the rate has no end.")
    return tuple(notes)
