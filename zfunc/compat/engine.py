# SPDX-License-Identifier: Apache-2.0
"""The engine: the one mutable object of the project, around the pure step.

Scripts that were written for DeepSpeed change their engine by calling it. All of that
change is here: each method puts the result of a pure function in the place of
``self._now``. tests/test_style.py knows this one exception by name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from zfunc.compat import checkpoints, microbatch
from zfunc.compat.errors import CompatError
from zfunc.compat.microbatch import AXIS, Given, Model, Pair
from zfunc.compat.missing import Missing
from zfunc.compat.modules import digest_of, holding
from zfunc.compat.setting import Setting
from zfunc.core import collectives
from zfunc.core.mesh import Mesh
from zfunc.core.sharding import replicate
from zfunc.core.state import Mean, TrainState
from zfunc.core.step import train_step
from zfunc.core.tally import Tally


class Now(NamedTuple):
    """Where an engine is.

    Attributes:
      state: Between steps.
      given: What the last training forward handed out; None after its backward.
      total: The microbatches' tallies and reduced gradients so far.
      pending: Whether a backward waits for its ``step()``.
      micro_steps: Calls of ``step()`` so far.
      boundary: Whether a ``step()`` updates, where the script said so.
      returns_loss: Whether the module returned its loss, by the form of the call.
    """

    state: TrainState
    given: Given | None = None
    total: Pair | None = None
    pending: bool = False
    micro_steps: int = 0
    boundary: bool | None = None
    returns_loss: tuple[tuple[Any, bool], ...] = ()


class Engine(Missing):
    """A module, its optimizer and its state behind DeepSpeed's calls.

    Made by ``initialize``. ``engine(...)``, ``engine.backward(loss)`` and
    ``engine.step()`` run once per microbatch; every ``gradient_accumulation_steps()``
    calls of ``step`` there is one update, of the mean loss over microbatches and ranks.

    Where the module returns its loss (a 0-d tensor, ``loss`` of what it returns, or
    the first of a tuple), its gradient is computed in the call; else the backward runs
    the forward once more (a third of a step), with the same random numbers.

    Differs from DeepSpeed: gradients are reduced at each backward, at all stages.
    Outputs that are no tensors, numbers or strings (a cache) are handed out as None
    while training.

    Example:
      >>> from zfunc.compat import initialize
      >>> config = {"train_batch_size": 2, "optimizer": {"type": "SGD"}}
      >>> engine = initialize(model=nn.Linear(2, 1), config=config)[0]
      >>> loss = engine(torch.ones(2, 2)).mean()
      >>> _ = engine.backward(loss)
      >>> engine.step()
      >>> engine.global_steps
      1
    """

    def __init__(
        self, model: Model, state: TrainState, mesh: Mesh, setting: Setting
    ) -> None:
        self._model, self._mesh, self._setting = model, mesh, setting
        self._now = Now(state)

    def _build(self, loss_fn: Any) -> Any:
        return train_step(loss_fn, self._setting.tx, *self._setting.transforms)

    # --- training --------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's outputs; in training mode they take part in ``backward``."""
        now, batch = self._now, (args, kwargs)
        if not (self.training and torch.is_grad_enabled()):
            return microbatch.outputs_of(
                self._build, self._model, now.state.params, batch
            )
        form = (len(args), tuple(sorted(kwargs)))
        known = dict(now.returns_loss)
        out, given = microbatch.forward(
            self._build, self._model, now.state, batch, try_loss=known.get(form, True)
        )
        known[form] = given.loss is not None
        self._now = now._replace(given=given, returns_loss=tuple(known.items()))
        return out

    forward = __call__

    def backward(
        self, loss: Any, retain_graph: bool = False, *, scale_wrt_gas: bool = True
    ) -> Any:
        """Add up the gradient of a loss that was made of the last call's outputs.

        Every rank calls it. The gradient is divided by
        ``gradient_accumulation_steps()``, unless ``scale_wrt_gas`` is False. The graph
        of the loss is kept in any case.

        Raises:
          CompatError: the loss is detached, of an older call, or depends on anything
            that requires grad and is no output of the last call.
        """
        now = self._now
        given = self._checked(loss)
        share = 1.0 / self._setting.accumulation if scale_wrt_gas else 1.0
        slope = microbatch.slope_of(loss, given)
        row = [float("nan") if slope is None else float(slope), float(loss.detach())]
        mine = torch.tensor([row], dtype=torch.float64, device=self.device)
        rows = collectives.all_gather(mine, AXIS, self._mesh)
        # Reduced gradients are right where all ranks multiply theirs by one number.
        if bool((rows[:, 0] == rows[0, 0]).all()):
            grads, factor = cast(Pair, given.pair)[1], share * float(rows[0, 0])
        else:
            build, model, state = self._build, self._model, now.state
            grads = microbatch.weighted(build, model, state, given, loss)[1]
            factor = share
        ranks = rows.new_full((), len(rows) if now.total is None else 0)
        tally = Tally(Mean(rows[:, 1].sum() * share, ranks), {})
        total = microbatch.added(now.total, (tally, grads), factor)
        self._now = now._replace(given=None, total=total, pending=True)
        return loss

    def _checked(self, loss: Any) -> Given:
        now = self._now
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss)
            raise CompatError(
                f"engine.backward takes a scalar loss, got {got}: reduce it (.mean())"
            )
        if now.pending:
            raise CompatError(
                "engine.backward was called twice: call engine.step() after each "
                "backward, at every microbatch"
            )
        if now.given is None:
            raise CompatError(
                "engine.backward before a forward: call the engine in training mode "
                "(engine.train(), outside of torch.no_grad(); from_pretrained returns "
                "a model in evaluation mode), and make the loss of what it returns"
            )
        if not loss.requires_grad:
            raise CompatError(
                "engine.backward: the loss does not depend on what the engine returned "
                "(detached, computed under torch.no_grad(), or of an evaluation)"
            )
        known = {id(leaf) for leaf in now.given.leaves}
        strangers = [x for x in microbatch.leaves_of(loss) if id(x) not in known]
        if strangers:
            raise CompatError(
                f"engine.backward: the loss depends on a tensor of shape "
                f"{tuple(strangers[0].shape)} that requires grad and that the engine's "
                "last call did not return (an older call, a parameter): its gradient "
                "would be lost. Make the loss of the last call's outputs alone; "
                "compute what needs parameters inside of the module"
            )
        return now.given

    def step(self) -> None:
        """Count the microbatch; at the last one of a step, update.

        Raises:
          CompatError: no backward since the last ``step()``.
        """
        now = self._now
        if not now.pending:
            raise CompatError("engine.step() without a backward: call it after each")
        last = self.is_gradient_accumulation_boundary()
        now = now._replace(pending=False, micro_steps=now.micro_steps + 1)
        if last:
            state = microbatch.applied(self._build, now.state, cast(Pair, now.total))
            now = now._replace(state=state, total=None)
        self._now = now

    def train(self, mode: bool = True) -> Engine:
        """The module in training mode; its calls compute gradients."""
        self._model.shell.train(mode)
        return self

    def eval(self) -> Engine:
        """The module in evaluation mode; its calls compute no gradients."""
        return self.train(False)

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self._model.shell.training

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: an update lets its gradients go.

        Raises:
          CompatError: amid a step, where it would lose gradients.
        """
        self._check_between_steps("zero_grad")

    # --- checkpoints -------------------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
    ) -> bool:
        """Save the state under a tag (default ``global_step<N>``); every rank calls.

        ``client_state`` is JSON, the same on every rank. Frozen parameters and buffers
        are not saved; a checkpoint knows their hash.

        Raises:
          CompatError: amid a step, whose gradients would be lost.
        """
        self._check_between_steps("save_checkpoint")
        name = f"global_step{self.global_steps}" if tag is None else str(tag)
        rest = digest_of(self._model.rest)
        meta = {"client_state": client_state or {}, "rest": rest}
        state, mesh = self._now.state, self._mesh
        checkpoints.write(save_dir, name, state, meta, mesh, save_latest=save_latest)
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        *,
        load_module_only: bool = False,
        load_optimizer_states: bool = True,
    ) -> tuple[str | None, dict[str, Any] | None]:
        """Put back what was saved; ``(path, client_state)``, or ``(None, None)``.

        Without a tag, the one that ``latest`` names. ``load_module_only``, or
        ``load_optimizer_states=False``, takes the parameters alone.

        Raises:
          CompatError: a checkpoint of DeepSpeed itself, or of another module.
        """
        found = checkpoints.read(load_dir, tag, self._now.state)
        if found is None:
            return None, None
        path, restored = found
        if restored.meta.get("rest") != digest_of(self._model.rest):
            raise CompatError(
                f"{path}: saved with other frozen parameters or buffers: build the "
                "module as it was built then"
            )
        state = restored.state
        if load_module_only or not load_optimizer_states:
            state = self._now.state.replace(params=state.params)
        micro_steps = int(state.step) * self._setting.accumulation
        self._now = Now(state, micro_steps=micro_steps, boundary=self._now.boundary)
        return str(path), restored.meta["client_state"]

    def save_16bit_model(
        self, save_dir: str | os.PathLike[str], save_filename: str = "pytorch_model.bin"
    ) -> bool:
        """Write the module's state dict in the dtype of the forward; all ranks call.

        A name that ends in ``.safetensors`` gives that format, others torch's.
        """
        module = self.module
        if self._mesh.rank == 0:
            path = Path(save_dir) / save_filename
            checkpoints.write_half(path, module, self._setting.compute)
        checkpoints.wait_for_all(self._mesh)
        return True

    def _check_between_steps(self, name: str) -> None:
        if self._now.pending or self._now.total is not None:
            raise CompatError(
                f"engine.{name}: {self._now.micro_steps} microbatches so far, amid a "
                f"step of {self._setting.accumulation}, whose gradients would be lost: "
                "call it after the step() that updates"
            )

    # --- what it says ------------------------------------------------------------

    @property
    def state(self) -> TrainState:
        """The state as it is now; ``step`` uses it up."""
        return self._now.state

    @property
    def module(self) -> nn.Module:
        """A new module with the parameters of now: every rank has to ask for it."""
        return holding(self._model, replicate(self._now.state.params))

    @property
    def global_steps(self) -> int:
        """Updates so far, skipped ones included."""
        return int(self._now.state.step)

    @property
    def skipped_steps(self) -> int:
        """Updates that were left out since their gradients were not finite."""
        scale = self._now.state.loss_scale
        return 0 if scale is None else int(scale.skipped_steps)

    @property
    def cur_scale(self) -> float:
        """The loss scale; 1 where there is none."""
        scale = self._now.state.loss_scale
        return 1.0 if scale is None else float(scale.scale)

    loss_scale = cur_scale

    @property
    def micro_steps(self) -> int:
        """Microbatches so far."""
        return self._now.micro_steps

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return self._mesh.device

    def get_lr(self) -> list[float]:
        """The learning rate of the next update.

        Raises:
          CompatError: the optimizer was given and knows it alone.
        """
        if self._setting.lr is None:
            raise CompatError(
                "engine.get_lr(): the rate is in the optimizer that initialize was "
                "given: give a function of the schedule, as lambda rate: "
                'zf.optim.adamw(rate), and a section "scheduler"'
            )
        return [self._setting.lr(self.global_steps - self.skipped_steps)]

    def last_lr(self) -> float:
        """The learning rate of the last update, left out or not."""
        if self._setting.lr is None or not self.global_steps:
            return self.get_lr()[0]
        done = 1 - int(self._now.state.metrics.skipped)
        return self._setting.lr(self.global_steps - self.skipped_steps - done)

    @property
    def local_rank(self) -> int:
        """Of this process on its machine; 0 outside of a job."""
        return int(os.environ.get("LOCAL_RANK", "0"))

    @property
    def global_rank(self) -> int:
        """Of this process in the job."""
        return int(self._mesh.rank)

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self._mesh.size

    def get_global_grad_norm(self) -> float | None:
        """The norm of the last update's gradient, before clipping; None before one."""
        metrics = self._now.state.metrics
        return float(metrics.grad_norm) if self.global_steps else None

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the next ``step()`` updates."""
        if self._now.boundary is not None:
            return self._now.boundary
        return (self._now.micro_steps + 1) % self._setting.accumulation == 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Say whether each ``step()`` updates, until this is called again."""
        self._now = self._now._replace(boundary=bool(is_boundary))

    def gradient_accumulation_steps(self) -> int:
        """Microbatches per update."""
        return self._setting.accumulation

    def train_micro_batch_size_per_gpu(self) -> int:
        """Samples per rank and microbatch, by the configuration."""
        return self._setting.micro_batch

    def train_batch_size(self) -> int:
        """Samples per update, over all ranks."""
        return self._setting.micro_batch * self._setting.accumulation * self._mesh.size

    def zero_optimization_stage(self) -> int:
        """The stage of ZeRO."""
        return self._setting.zero
