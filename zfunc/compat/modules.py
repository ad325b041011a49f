# SPDX-License-Identifier: Apache-2.0
"""Taking a module over, and making one that holds the parameters as they are now."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from zfunc.compat.errors import CompatError
from zfunc.compat.microbatch import Model
from zfunc.core.mesh import Mesh
from zfunc.models.hf.errors import ModelError
from zfunc.models.hf.private import check_own_code, check_values


def take_over(
    module: nn.Module,
    trained: Iterable[Any] | None,
    mesh: Mesh,
    compute: torch.dtype | None,
) -> tuple[dict[str, torch.Tensor], Model]:
    """The trained parameters of a module, and the rest of it as a function of them.

    The module itself keeps no trained parameter: they go to the meta device, so that
    whoever goes on using it is told, instead of saving first weights as last ones. All
    ranks get the values of rank 0, as with DeepSpeed.

    Args:
      module: The user's.
      trained: Which parameters are trained; None for all that require grad.
      mesh: Where the values go.
      compute: What frozen floating parameters are cast to; None casts none. Buffers
        keep their dtype, as with DeepSpeed.

    Raises:
      CompatError: A module that cannot be trained as a pure function.
    """
    check_module(module)
    names = _trained_names(module, trained)
    named = dict(module.named_parameters())
    params = {name: named[name].detach().to(mesh.device) for name in names}
    frozen = {name: p.detach() for name, p in named.items() if name not in params}
    others = {**frozen, **dict(module.named_buffers())}
    others = {name: x.to(mesh.device) for name, x in others.items()}
    if mesh.kind == "process":
        params, others = _of_rank_0(params), _of_rank_0(others)
    _replace(module, others)
    _replace(module, {n: torch.empty_like(named[n], device="meta") for n in names})
    rest = {n: _cast(x, compute) if n in frozen else x for n, x in others.items()}
    shell = copy.deepcopy(module)
    for part in shell.modules():
        if type(part).__name__ == "BloomGelu":  # an autograd.Function of the old kind
            part.forward = functools.partial(F.gelu, approximate="tanh")
    module.register_forward_pre_hook(_refuse)
    module.register_state_dict_pre_hook(_refuse)
    return params, Model(shell, rest, _places(shell))


def holding(model: Model, params: dict[str, torch.Tensor]) -> nn.Module:
    """A new module like the one that was taken over, with these parameters.

    Args:
      model: What ``take_over`` returned.
      params: Whole tensors, by name.
    """
    made = copy.deepcopy(model.shell)
    _replace(made, params)
    return made


def digest_of(rest: dict[str, torch.Tensor]) -> str:
    """A hash of what is not trained, which a checkpoint does not hold.

    Examples:
      >>> digest_of({}) == digest_of({"b": torch.zeros(1)})
      False
    """
    found = hashlib.sha256()
    for name, x in sorted(rest.items()):
        flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(f"{name}:{tuple(x.shape)}:{x.dtype}\n".encode())
        found.update(flat.numpy().tobytes())
    return found.hexdigest()


def check_module(module: Any) -> None:
    """Raise where a module cannot be trained as a pure function.

    Raises:
      CompatError: with what to change.
    """
    if not isinstance(module, nn.Module):
        raise CompatError(
            f"initialize: model is a {type(module).__name__}, expected a torch.nn."
            "Module; a loss that is a function goes to zf.train_step"
        )
    if _refuse in module._forward_pre_hooks.values():
        raise CompatError(
            "initialize: model was given to an engine before, and its parameters live "
            "there: give engine.module, or a new one"
        )
    for path, part in module.named_modules():
        where = f"initialize: model.{path}" if path else "initialize: model"
        is_batch_norm = isinstance(part, nn.modules.batchnorm._NormBase)
        if is_batch_norm and part.track_running_stats:
            raise CompatError(
                f"{where} is a {type(part).__name__} that writes running statistics in "
                "its forward, which a pure function cannot: use GroupNorm or "
                "LayerNorm, or track_running_stats=False"
            )
        on_cpu = not torch.cuda.is_available()
        if isinstance(part, nn.LSTM) and on_cpu and torch.backends.mkldnn.enabled:
            raise CompatError(
                f"{where} is an LSTM, whose kernel of oneDNN cannot be differentiated "
                "under torch.func: call torch.backends.mkldnn.set_flags(False) first"
            )
        if getattr(part, "rope_type", None) in ("dynamic", "longrope"):
            raise CompatError(
                f"{where} has rope_type={part.rope_type!r}, which writes to a buffer "
                "in its forward: set config.rope_parameters to 'default', 'linear', "
                "'llama3' or 'yarn'"
            )
        if getattr(part, "gradient_checkpointing", False) is True:
            raise CompatError(
                f"{where} has activation checkpointing on, which torch.func does not "
                "support: call model.activation_checkpointing_disable()"
            )
    try:
        check_values(module, "load or make them before initialize")
        check_own_code(module)
    except ModelError as error:
        raise CompatError(f"initialize: model: {error}") from None
    if not any(p.requires_grad for p in module.parameters()):
        raise CompatError("initialize: model has no parameter that requires grad")


def _trained_names(module: nn.Module, trained: Iterable[Any] | None) -> list[str]:
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    if trained is None:
        return list(named)
    given = list(trained)
    if any(isinstance(item, dict) for item in given):
        raise CompatError(
            "initialize: model_parameters has groups with settings of their own, "
            "which the bridge has not: give model.parameters(), and an optimizer "
            "made of zf.optim with masks as optimizer="
        )
    ids = {id(p) for p in given}
    strangers = len(ids - {id(p) for p in module.parameters()})
    if strangers:
        raise CompatError(
            f"initialize: {strangers} of model_parameters are not parameters of model"
        )
    chosen = [name for name, p in named.items() if id(p) in ids]
    if not chosen:
        raise CompatError(
            "initialize: none of model_parameters requires grad (a generator such as "
            "model.parameters() can be used once)"
        )
    return chosen


def _places(module: nn.Module) -> dict[str, str]:
    """Each place of a tensor in a module, and the first name of the tensor there."""
    named = [*module.named_parameters(), *module.named_buffers()]
    first = {id(x): name for name, x in named}
    return {
        f"{path}.{name}" if path else name: first[id(x)]
        for path, part in module.named_modules()
        for name, x in [*part._parameters.items(), *part._buffers.items()]
        if x is not None
    }


def _cast(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return x.to(dtype) if dtype is not None and x.is_floating_point() else x


def _of_rank_0(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    sent = {name: x.clone().contiguous() for name, x in tensors.items()}
    for x in sent.values():
        if x.numel():  # bytes: gloo does not know every dtype
            dist.broadcast(x.view(-1).view(torch.uint8), 0)
    return sent


def _replace(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Put other tensors in the place of some, shared ones shared again."""
    named = [*module.named_parameters(), *module.named_buffers()]
    new: dict[int, Any] = {id(x): values[name] for name, x in named if name in values}
    for old in dict(module.named_parameters()).values():
        if id(old) in new:
            new[id(old)] = nn.Parameter(new[id(old)], old.requires_grad)
    for part in module.modules():
        tables: list[dict[str, Any]] = [part._parameters, part._buffers]
        for table in tables:
            for name, old in table.items():
                if id(old) in new:
                    table[name] = new[id(old)]


def _refuse(*_: Any) -> NoReturn:
    raise CompatError(
        "this module was given to zfunc.compat.initialize, and its parameters live in "
        "the engine now: call the engine, or take engine.module, which holds them"
    )
