# SPDX-License-Identifier: Apache-2.0
"""The Trainer of transformers, which trains with zfunc; imported when it is used.

Its base class changes itself by design, so this file may too (see engine.py).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from typing import Any, Final

import torch
from torch import nn

from zfunc.compat.bridge import Config, engine_of
from zfunc.compat.checkpoints import refuse_theirs
from zfunc.compat.engine import Engine
from zfunc.compat.errors import CompatError
from zfunc.compat.hf_auto import Run, setting_for
from zfunc.compat.views import OptimizerView, SchedulerView
from zfunc.core.mesh import make_mesh

_MISSING: Final = tuple(
    name
    for name in ("transformers", "accelerate")
    if importlib.util.find_spec(name) is None
)
if _MISSING:
    raise CompatError(
        f"zfunc.compat.Trainer needs {' and '.join(_MISSING)}: "
        "pip install 'transformers>=5.23' accelerate"
    )
_transformers: Any = importlib.import_module("transformers")
# What is replaced here has to be there: a release that renames one would train a
# model of its own.
_REPLACED: Final = (
    "_prepare_for_training",
    "_wrap_model",
    "_clip_grad_norm",
    "_get_grad_norm",
    "_get_learning_rate",
    "_load_from_checkpoint",
    "_load_best_model",
    "_save_optimizer_and_scheduler",
    "training_step",
    "save_model",
)
# What is not called here: a subclass that overrides one would wait for it.
_UNUSED: Final = (
    "create_optimizer",
    "create_scheduler",
    "create_optimizer_and_scheduler",
    "get_optimizer_cls_and_kwargs",
)
# TrainingArguments that have another place, or none, with what they have to be.
_REFUSED: Final = (
    ("deepspeed", None, "give the file as Trainer(ds_config=...)"),
    ("fsdp", None, "ds_config says the stage of ZeRO"),
    ("torch_compile", False, "the bridge runs torch eagerly"),
    ("gradient_checkpointing", False, "torch.func does not support it"),
    ("activation_checkpointing", False, "torch.func does not support it"),
    ("auto_find_batch_size", False, "the batch size is in ds_config too"),
    ("neftune_noise_alpha", None, "it needs hooks of the module"),
    ("use_liger_kernel", False, "its kernels are no functions of torch.func"),
    ("parallelism_config", None, "all ranks are along the axis 'data'"),
)


class _Outer(nn.Module):
    """What the base class calls as the model: it asks the engine."""

    def __init__(self, engine: Engine, inner: nn.Module) -> None:
        super().__init__()
        self.engine, self.inner = engine, inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    def train(self, mode: bool = True) -> _Outer:
        self.engine.train(mode)
        return super().train(mode)

    def to(self, *_: Any, **__: Any) -> _Outer:
        """As it is: the engine's device and precision are those of the forward."""
        return self

    def _get_name(self) -> str:
        return type(self.inner).__name__


class _Optimizer(OptimizerView):
    """What the base class and callbacks take for the optimizer."""

    def step(self) -> None:  # type: ignore[override]
        """Nothing: the engine did it already."""


class _Scheduler(SchedulerView):
    """What the base class and callbacks take for the schedule."""

    def step(self) -> None:  # type: ignore[override]
        """Nothing: the engine did it already."""


class Trainer(_transformers.Trainer):  # type: ignore[misc] # has no types
    """``transformers.Trainer`` that trains with zfunc, from a DeepSpeed configuration.

    The arguments of the base class, and ``ds_config``, in the place of
    ``TrainingArguments(deepspeed=...)``. Values that say "auto" come from
    TrainingArguments, as transformers documents; values that say otherwise are one
    error that lists all. Callbacks, logging, evaluation, resuming and the folders
    ``checkpoint-N`` are those of the base class; in each lie the model as safetensors
    and the state as a checkpoint of zfunc, which restores on any number of ranks.

    After ``train()`` the parameters are in ``trainer.engine``, and
    ``trainer.engine.module`` is a model that holds them; ``evaluate``, ``predict`` and
    ``save_model`` use the engine.

    Args:
      ds_config: A dict or the path of a JSON file.

    Raises:
      ConfigError: (from ``train``) What is wrong with the configuration.
      CompatError: TrainingArguments that have no meaning here.

    Laws:
      Losses are those of the base class with the same AdamW and schedule, up to the
      order of sums.

    Differs from:
      transformers with DeepSpeed: the loss that is reported is that of all tokens of a
      step, as without DeepSpeed.

    Example:
      >>> from transformers import TrainingArguments
      >>> from zfunc.compat import Trainer
      >>> issubclass(Trainer, __import__("transformers").Trainer)
      True
    """

    def __init__(self, *args: Any, ds_config: Config, **kwargs: Any) -> None:
        missing = [
            name for name in _REPLACED if not hasattr(_transformers.Trainer, name)
        ]
        if missing:
            raise CompatError(
                f"zfunc.compat.Trainer does not know transformers "
                f"{_transformers.__version__}: its Trainer has no "
                f"{', '.join(missing)}; pip install 'transformers>=5.23'"
            )
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        _check(given)
        super().__init__(*args, **kwargs)
        _check_own(self)
        if self.args.n_gpu > 1:
            raise CompatError("Trainer: start one process per GPU, with torchrun")
        self.ds_config = ds_config
        self.engine: Engine | None = None

    # --- training ----------------------------------------------------------------

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any
    ) -> tuple[nn.Module, Any]:
        # With model_init there is another model by now.
        wrapped: Any = self.model_wrapped
        trained = isinstance(wrapped, _Outer) and wrapped.inner is self.model
        source: Any = self._engine().module if trained else self.model
        decays = frozenset(self.get_decay_parameter_names(source))
        setting = setting_for(self.ds_config, Run(self.args, source, max_steps, decays))
        mesh = make_mesh({"data": self.args.world_size})
        self.engine = engine_of(source, setting, mesh)
        if trained:
            self.model: Any = source
        self.model_wrapped: Any = _Outer(self.engine, self.model)
        self.optimizer = _Optimizer(self.engine)
        self.lr_scheduler = _Scheduler(self.engine)
        if resume_from_checkpoint is not None:
            self._load(resume_from_checkpoint)
        handler = self.callback_handler
        handler.model, handler.optimizer = self.model, self.optimizer
        handler.lr_scheduler, handler.train_dataloader = (
            self.lr_scheduler,
            train_dataloader,
        )
        return self.model_wrapped, train_dataloader

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One microbatch: forward, backward, and at the last one the update."""
        engine = self._engine()
        model.train()
        inputs = self._prepare_inputs(inputs)
        if isinstance(num_items_in_batch, torch.Tensor):
            # A number: a tensor would be cast to the dtype of the forward.
            num_items_in_batch = float(num_items_in_batch)
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            counted = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = counted or self.compute_loss_func is not None
        if not is_scaled:
            loss = loss / self.current_gradient_accumulation_steps
        engine.backward(loss, scale_wrt_gas=False)
        engine.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        engine.step()
        detached: torch.Tensor = loss.detach()
        return detached

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> contextlib.AbstractContextManager[None]:
        """Nothing: the engine's precision is that of the configuration."""
        return contextlib.nullcontext()

    def _clip_grad_norm(self, model: Any) -> float | None:
        return self._engine().get_global_grad_norm()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float | None:
        return self._engine().get_global_grad_norm()

    def _get_learning_rate(self) -> float:
        return self._engine().last_lr()

    # --- evaluation --------------------------------------------------------------

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self.engine is not None:
            return self.model_wrapped
        return super()._wrap_model(model, *args, **kwargs)

    # --- checkpoints -------------------------------------------------------------

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False
    ) -> None:
        """Write the model as it is now; every rank calls it."""
        if self.engine is None:
            super().save_model(output_dir, _internal_call)
            return
        kept = self.model
        self.model = self.engine.module
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self.model = kept

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._engine().save_checkpoint(output_dir)

    def _load_from_checkpoint(self, folder: str, model: Any = None) -> None:
        """Nothing: the engine loads it when there is one."""

    def _load_best_model(self) -> None:
        self._load(self.state.best_model_checkpoint, load_module_only=True)

    def _load(self, folder: str, *, load_module_only: bool = False) -> None:
        refuse_theirs(folder)
        if not os.path.isfile(os.path.join(folder, "latest")):
            raise CompatError(
                f"{folder} holds no checkpoint of zfunc to go on from: it was saved "
                "with save_only_model, or by another Trainer; give its model to a new "
                "Trainer, as from_pretrained(...)"
            )
        self._engine().load_checkpoint(folder, load_module_only=load_module_only)

    def _engine(self) -> Engine:
        if self.engine is None:
            raise CompatError("Trainer: there is no engine before train()")
        return self.engine


def _check(args: Any) -> None:
    problems = [
        f"TrainingArguments({name}={getattr(args, name)!r}): {why}"
        for name, off, why in _REFUSED
        if getattr(args, name, off) not in (off, None, False, "", [])
    ]
    only_model = getattr(args, "save_only_model", False)
    if only_model and getattr(args, "load_best_model_at_end", False):
        problems.append(
            "TrainingArguments(save_only_model=True): load_best_model_at_end reads the "
            "state that it leaves out"
        )
    if problems:
        raise CompatError("Trainer cannot use\n  " + "\n  ".join(problems))


def _check_own(trainer: Any) -> None:
    """Raise where there is an optimizer or a schedule that would not be used."""
    base = _transformers.Trainer
    given = (
        trainer.optimizer,
        trainer.lr_scheduler,
        getattr(trainer, "optimizer_cls_and_kwargs", None),
    )
    names = ["optimizers"] if any(each is not None for each in given) else []
    names += [
        f"{type(trainer).__name__}.{name}"
        for name in _UNUSED
        if getattr(type(trainer), name, None) is not getattr(base, name, None)
    ]
    if names:
        raise CompatError(
            f"Trainer cannot use\n  {', '.join(names)}: ds_config or TrainingArguments "
            "say the optimizer and schedule"
        )
