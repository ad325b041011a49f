# SPDX-License-Identifier: Apache-2.0
"""``from_module``: any ``torch.nn.Module`` as parameters and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch.func import functional_call

from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.layout import Layout
from zfunc.models.hf.loss import all_weights
from zfunc.models.hf.private import check_own_code, check_values, on_meta
from zfunc.models.hf.trainable import Chosen, split

# The modules of torch that draw numbers in training mode, and what says how many.
_RATES: Final = (
    (torch.nn.modules.dropout._DropoutNd, "p"),
    (torch.nn.MultiheadAttention, "dropout"),
    (torch.nn.RNNBase, "dropout"),
)


@dataclass(frozen=True, eq=False)
class ModuleLoss:
    """``(params, batch) -> loss``: what ``from_module`` returns.

    Attributes:
      module: The module on the meta device: its code.
      buffers: Its buffers, by name.
      frozen: The parameters that are not trained.
      loss: The function that it was made with.
      names: The names of all parameters, tied ones once.

    Example:
      >>> params, loss_fn = from_module(
      ...     torch.nn.Linear(1, 1), lambda call, x: call(x).square().mean()
      ... )
      >>> loss_fn(params, torch.ones(2, 1)).shape
      torch.Size([])
    """

    module: torch.nn.Module = field(repr=False)
    buffers: Mapping[str, torch.Tensor] = field(repr=False)
    frozen: Mapping[str, Any] = field(repr=False)
    loss: Callable[[Callable[..., Any], Any], Any]
    names: frozenset[str] = field(repr=False)

    def __deepcopy__(self, memo: Any) -> ModuleLoss:
        """Itself: nothing in it changes."""
        return self

    def __call__(self, params: Mapping[str, Any], batch: Any) -> Any:
        """``loss(call, batch)``, where ``call`` is the module with these parameters.

        Raises:
          ModelError: the module wrote to one of its buffers.
        """
        weights = all_weights(params, self.frozen, self.names)
        before = {name: b._version for name, b in self.buffers.items()}

        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = {**weights, **self.buffers}
            out = functional_call(self.module, tensors, args, kwargs)
            for name, buffer in self.buffers.items():
                if tensors[name] is not buffer:  # set anew, which was noted there
                    raise _writes(name)
            return out

        value = self.loss(call, batch)
        for name, version in before.items():
            if self.buffers[name]._version != version:
                raise _writes(name)
        return value


def from_module(
    module: torch.nn.Module,
    loss: Callable[[Callable[..., Any], Any], Any],
    *,
    mesh: Any = None,
    spec: Any = None,
    dtype: torch.dtype | None = None,
    trainable: Chosen | None = None,
    dropout: Literal["off"] | None = None,
) -> tuple[dict[str, Any], ModuleLoss]:
    """The parameters of a module and a loss of them; the module is left alone.

    Args:
      module: Any module, in the mode (``train()`` or ``eval()``) it is to compute in.
      loss: ``loss(call, batch)``, where ``call(*args, **kwargs)`` is the module with
        the parameters of the moment. It returns what a loss of ``zf.train_step`` may: a
        scalar, ``(scalar, aux)`` or ``zf.Mean``.
      mesh: If given, the leaves are this rank's pieces; else plain tensors, which are
        the module's own.
      spec: As in ``from_hf``.
      dtype: Storage dtype; None keeps each parameter's.
      trainable: As in ``from_hf``: what is not chosen is in ``loss.frozen``.
      dropout: ``"off"`` to compute without the module's ``Dropout`` layers.

    Returns:
      ``(params, loss_fn)``: leaves by the names of ``module.named_parameters()``.
      Buffers are constants of the loss.

    Raises:
      ModelError: a module that writes to its buffers, or has dropout in training mode.

    Examples:
      >>> import zfunc as zf
      >>> module = torch.nn.Linear(2, 1, bias=False)
      >>> params, loss_fn = from_module(
      ...     module,
      ...     lambda call, batch: (call(batch["x"]) - batch["y"]).square().mean(),
      ... )
      >>> step = zf.train_step(loss_fn, zf.optim.sgd(0.1))
      >>> state = zf.shard(params, zf.make_mesh({}))
      >>> batch = {"x": torch.eye(2), "y": torch.ones(2, 1)}
      >>> bool(step(state, batch).metrics.loss < 4)
      True

    Differs from ``torch.func.functional_call``: nothing is left to remember (buffers,
    frozen parameters, modules that write to themselves).
    """
    layout = Layout(mesh, spec, dtype)
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"from_module takes a torch.nn.Module, got {module!r}")
    if not callable(loss):
        raise TypeError(
            f"from_module: loss is a function of (call, batch), got {loss!r}"
        )
    check_own_code(module)
    check_values(module, "give it some (module.to_empty, then its initialisation)")
    copied = _checked(on_meta(module), dropout)
    leaves = {n: layout.placed(n, p) for n, p in module.named_parameters()}
    layout.check_names(set(leaves))
    flags = {n: p.requires_grad for n, p in module.named_parameters()}
    chosen: Chosen = flags.__getitem__ if trainable is None else trainable
    params, frozen = split(leaves, chosen)
    buffers = {n: layout.whole(b) for n, b in module.named_buffers()}
    return params, ModuleLoss(copied, buffers, frozen, loss, frozenset(leaves))


def _checked(copied: torch.nn.Module, dropout: str | None) -> torch.nn.Module:
    if dropout not in (None, "off"):
        raise ModelError(f"dropout is 'off' or None, got {dropout!r}.")
    for name, part in copied.named_modules():
        if getattr(part, "track_running_stats", False) and part.training:
            raise _writes(f"{name}.running_mean".lstrip("."))
        for kind, attribute in _RATES:
            rate = getattr(part, attribute) if isinstance(part, kind) else 0
            if not part.training or not rate:
                continue
            if dropout is None:
                raise ModelError(
                    f"{name} is a {type(part).__name__} with {attribute}={rate}: its "
                    "numbers come from torch's generator, which a step has no part in. "
                    "Pass dropout='off', call module.eval(), or use zf.random.dropout "
                    "with a key."
                )
            setattr(part, attribute, 0.0)
    return copied


def _writes(name: str) -> ModelError:
    return ModelError(
        f"the module writes to its buffer {name!r} in the forward, and a step changes "
        "nothing but its state: call module.eval() before (running statistics are then "
        "constants), or take a norm without them, such as torch.nn.GroupNorm."
    )
