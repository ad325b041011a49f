# SPDX-License-Identifier: Apache-2.0
"""What "auto" is, from TrainingArguments: the values that transformers documents."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final, NamedTuple, cast

import torch

from zfunc.compat.bridge import Config, setting_of
from zfunc.compat.errors import CompatError
from zfunc.compat.setting import Setting
from zfunc.config.errors import ConfigError
from zfunc.config.reading import read
from zfunc.optim.adamw import adamw
from zfunc.optim.base import GradientTransformation

_CLIPPING: Final = 1.0  # of a configuration that does not say it
_PRECISIONS: Final = (("fp16", "fp16"), ("bf16", "bfloat16"))
_ADAMS: Final = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw")


class Run(NamedTuple):
    """What the values depend on.

    Attributes:
      args: TrainingArguments.
      model: The model.
      total_steps: Updates of the whole training.
      decays: The names of parameters that AdamW decays.
    """

    args: Any
    model: Any
    total_steps: int
    decays: frozenset[str]


def setting_for(source: Config, run: Run) -> Setting:
    """What an engine needs, of a configuration and TrainingArguments.

    Without a section ``optimizer`` it is the AdamW of TrainingArguments, without a
    section ``scheduler`` their schedule, as transformers does with DeepSpeed.

    Args:
      source: The configuration.
      run: The rest.

    Raises:
      ConfigError: What is wrong with the configuration, every value that differs from
        TrainingArguments included.
      CompatError: An optimizer or a schedule that is not here.
    """
    name, raw = read(source)
    try:
        return _setting(dict(raw), run)
    except ConfigError as error:  # of the dict; the file has a name
        raise ConfigError(name, error.problems) from None


def _setting(raw: dict[str, Any], run: Run) -> Setting:
    raw = _with_precision(raw, run.args)
    if "gradient_clipping" not in raw and run.args.max_grad_norm != _CLIPPING:
        raise CompatError(
            f"Trainer: max_grad_norm is {run.args.max_grad_norm!r}, and ds_config has "
            f"no gradient_clipping, which is {_CLIPPING} then: write "
            '"gradient_clipping": "auto"'
        )
    scheduled = "scheduler" in raw
    rates = None if scheduled else rates_of(run)
    auto = auto_values(raw, run)
    client = None
    if "optimizer" not in raw:
        client = _client(run, rates)
    elif rates is not None:
        raw, client = _without_optimizer(raw, run, rates, auto)
    setting = setting_of(raw, client, auto=auto, total_steps=run.total_steps)
    if rates is None:
        return setting
    return setting._replace(lr=lambda count: float(rates(torch.tensor(count))))


def auto_values(raw: dict[str, Any], run: Run) -> dict[str, Any]:
    """Values by path; those that a configuration says otherwise are errors later.

    Args:
      raw: The configuration.
      run: What they depend on.
    """
    a, steps = run.args, run.total_steps
    micro, accumulation = a.per_device_train_batch_size, a.gradient_accumulation_steps
    compared = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": a.world_size * micro * accumulation,
        "gradient_clipping": a.max_grad_norm,
        "optimizer.params.lr": a.learning_rate,
        "optimizer.params.betas": [a.adam_beta1, a.adam_beta2],
        "optimizer.params.eps": a.adam_epsilon,
        "optimizer.params.weight_decay": a.weight_decay,
        "scheduler.params.warmup_max_lr": a.learning_rate,
        "scheduler.params.total_num_steps": steps,
        "scheduler.params.warmup_num_steps": max(1, a.get_warmup_steps(steps)),
        "fp16.enabled": bool(a.fp16 or a.fp16_full_eval),
        "bf16.enabled": bool(a.bf16 or a.bf16_full_eval),
    }
    filled: dict[str, Any] = {"scheduler.params.warmup_min_lr": 0}
    hidden = _hidden_size(run.model)
    if hidden is not None:
        zero = "zero_optimization."
        filled[f"{zero}reduce_bucket_size"] = hidden * hidden
        filled[f"{zero}stage3_prefetch_bucket_size"] = int(0.9 * hidden * hidden)
        filled[f"{zero}stage3_param_persistence_threshold"] = 10 * hidden
    there = {path for path in (*compared, *filled) if _at(raw, path) is not None}
    only_auto = {path: v for path, v in filled.items() if _at(raw, path) == "auto"}
    return {p: v for p, v in compared.items() if p in there} | only_auto


def rates_of(run: Run) -> Callable[[Any], torch.Tensor]:
    """The schedule of TrainingArguments as a function of the count of updates.

    Its rates are asked for once, for every update of the training.

    Args:
      run: TrainingArguments and the number of updates.

    Raises:
      CompatError: A schedule that looks at the loss.
    """
    a = run.args
    name = getattr(a.lr_scheduler_type, "value", a.lr_scheduler_type)
    if name in ("reduce_lr_on_plateau", "greedy"):
        raise CompatError(
            f"Trainer: lr_scheduler_type is {name!r}, which looks at the loss: a "
            'schedule is a function of the step here; type for example "cosine"'
        )
    optimization: Any = importlib.import_module("transformers.optimization")
    dummy = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=a.learning_rate)
    scheduler = optimization.get_scheduler(
        a.lr_scheduler_type,
        optimizer=dummy,
        num_warmup_steps=a.get_warmup_steps(run.total_steps),
        num_training_steps=run.total_steps,
        scheduler_specific_kwargs=a.lr_scheduler_kwargs or None,
    )
    found = []
    for _ in range(run.total_steps + 1):
        found.append(scheduler.get_last_lr()[0])
        dummy.step()
        scheduler.step()
    table = torch.tensor(found, dtype=torch.float64)

    def rates(step: Any) -> torch.Tensor:
        index = torch.as_tensor(step).clamp(max=len(table) - 1)
        return table.to(index.device)[index]

    return rates


def _with_precision(raw: dict[str, Any], args: Any) -> dict[str, Any]:
    """With the section that accelerate adds where TrainingArguments say a precision."""
    added = {
        name: {"enabled": True}
        for name, old in _PRECISIONS
        if (getattr(args, name) or getattr(args, f"{name}_full_eval"))
        and not {name, old} & raw.keys()
    }
    return {**raw, **added}


def _client(run: Run, rates: Any) -> Any:
    a = run.args
    name = getattr(a.optim, "value", a.optim)
    if name not in _ADAMS:
        raise CompatError(
            f"Trainer: optim is {name!r} and ds_config has no section optimizer: write "
            f"one, or type optim={_ADAMS[0]!r}"
        )

    def make(given: Any) -> GradientTransformation:
        return adamw(
            given,
            a.adam_beta1,
            a.adam_beta2,
            a.adam_epsilon,
            a.weight_decay,
            mask=lambda path, leaf: path in run.decays,
        )

    return make if rates is None else make(rates)


def _without_optimizer(
    raw: dict[str, Any], run: Run, rates: Any, auto: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """The configuration's Adam under the schedule of TrainingArguments."""
    setting_of(raw, auto=auto, total_steps=run.total_steps)  # what is wrong in it
    section = raw["optimizer"]
    known = {"lr", "betas", "eps", "weight_decay", "adam_w_mode", "torch_adam"}
    params = dict(section.get("params", {}))
    if section["type"].lower() not in ("adam", "adamw") or set(params) - known:
        raise CompatError(
            f"Trainer: ds_config has the optimizer {section['type']} and no section "
            "scheduler: write one, or an Adam with lr, betas, eps and weight_decay"
        )
    values = {
        name: auto.get(f"optimizer.params.{name}", v) for name, v in params.items()
    }
    if values.get("adam_w_mode") is False:
        raise CompatError(
            "Trainer: ds_config has an Adam with adam_w_mode false and no section "
            'scheduler: write one, as "scheduler": {"type": "WarmupLR"}'
        )
    b1, b2 = cast(Any, values.get("betas", (0.9, 0.999)))
    decay = cast(Any, values.get("weight_decay", 0.01 * bool(values.get("torch_adam"))))
    rest = {name: section for name, section in raw.items() if name != "optimizer"}
    return rest, adamw(rates, b1, b2, cast(Any, values.get("eps", 1e-8)), decay)


def _hidden_size(model: Any) -> int | None:
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        if getattr(part, "hidden_size", None) is not None:
            return int(part.hidden_size)  # type: ignore[union-attr]
        if getattr(part, "hidden_sizes", None):
            return int(max(part.hidden_sizes))  # type: ignore[union-attr]
    return None


def _at(raw: Any, path: str) -> Any:
    for name in path.split("."):
        if not isinstance(raw, dict):
            return None
        raw = raw.get(name)
    return raw
