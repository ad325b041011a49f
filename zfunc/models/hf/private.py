# SPDX-License-Identifier: Apache-2.0
"""A private copy of a module on the meta device: its code, without its numbers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from zfunc.models.hf.errors import ModelError

# Where a family writes `x += y` on a tensor of its own, which a traced program cannot:
# read in transformers 5.23. What else they write to is left as it is.
_REBOUND: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "falcon": {
            "add_": torch.Tensor.add,
            "div_": torch.Tensor.div,
            "mul_": torch.Tensor.mul,
        },
        "t5": {"add_": torch.Tensor.add},
        "mixtral": {"div_": torch.Tensor.div},
    }
)
# Their sines and cosines are computed anew from the batch, and written to a buffer.
_MOVING_ROPE: Final = ("dynamic", "longrope")


def check_own_code(module: torch.nn.Module) -> None:
    """Raise where a module runs code that a copy of it would not, or not alike.

    Hooks and forwards that were put on an instance refer to that instance.
    """
    for name, part in module.named_modules():
        hooks = [
            hook
            for hook in (
                *part._forward_hooks.values(),
                *part._forward_pre_hooks.values(),
                *part._backward_hooks.values(),
            )
            # Those that record outputs refer to no module, and do nothing here.
            if getattr(hook, "__module__", "") != "transformers.utils.output_capturing"
        ]
        if hooks or "forward" in vars(part):
            what = f"the hook {hooks[0]!r}" if hooks else "a forward of its own"
            raise ModelError(
                f"{name or type(part).__name__} has {what}: hooks and patched methods "
                "belong to one instance. Remove it (hook.remove(), or undo the patch) "
                "and write what it does as a module, or in the loss."
            )


def check_values(module: torch.nn.Module, remedy: str) -> None:
    """Raise where a parameter or buffer has a size and no numbers."""
    for name, x in (*module.named_parameters(), *module.named_buffers()):
        if x.is_meta:
            raise ModelError(
                f"{name} is on the meta device and has no values: {remedy}."
            )


def on_meta(module: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters and buffers have sizes only; the module is not touched.

    Tied parameters are one parameter in the copy too.

    Example:
      >>> copied = on_meta(torch.nn.Linear(2, 3))
      >>> copied.weight.device, copied.weight.shape
      (device(type='meta'), torch.Size([3, 2]))
    """
    memo: dict[int, Any] = {}
    for p in module.parameters():
        empty = torch.empty(p.shape, dtype=p.dtype, device="meta")
        memo[id(p)] = torch.nn.Parameter(empty, requires_grad=p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty(b.shape, dtype=b.dtype, device="meta")
    return copy.deepcopy(module, memo)


def made_functional(module: torch.nn.Module) -> torch.nn.Module:
    """The private copy with what torch.func or a traced program refuses replaced.

    Bloom's GeLU is an ``autograd.Function`` of the old kind; the experts of Mixtral run
    by a kernel that cannot be traced in float32, or by a loop over those that are hit.
    """
    for name, part in module.named_modules():
        kind = type(part).__name__
        if kind == "BloomGelu":
            part.forward = _bloom_gelu
        elif kind == "MixtralExperts":
            part.forward = functools.partial(_all_experts, part)
        if getattr(part, "rope_type", None) in _MOVING_ROPE:
            raise ModelError(
                f"{name} has rope_type={part.rope_type!r}, which writes to a buffer in "
                "the forward: set config.rope_parameters to 'default', 'linear', "
                "'llama3' or 'yarn'."
            )
    return module.eval()


def _bloom_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _all_experts(
    experts: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every expert on every token, weighted by 0 where it was not chosen.

    The shapes do not depend on the routing. E experts of which k are chosen cost E/k
    times the operations.
    """
    total = torch.zeros_like(x)
    for i in range(experts.num_experts):
        share = torch.where(index == i, weights, 0).sum(-1, keepdim=True)
        gate, up = F.linear(x, experts.gate_up_proj[i]).chunk(2, dim=-1)
        y = F.linear(experts.act_fn(gate) * up, experts.down_proj[i])
        total = total + (y * share).to(x.dtype)
    return total


class Rebinding(TorchFunctionMode):
    """Computes ``x = x + y`` where a family's code says ``x += y``."""

    def __init__(self, model_type: str) -> None:
        super().__init__()
        self.table: Mapping[str, Any] = _REBOUND.get(model_type, {})

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        func = self.table.get(getattr(func, "__name__", ""), func)
        return func(*args, **(kwargs or {}))


def dropout_keys(module: torch.nn.Module, config: Any) -> list[str]:
    """The config's keys of dropout that this model would use, as ``key=value``."""
    if not any(_drops(part) for part in module.modules()):
        return []
    names = [
        f"{key}={value}"
        for key, value in sorted(config.to_dict().items())
        if _random(key, value)
        and not key.startswith("summary_")
        and (key != "classifier_dropout" or hasattr(module, "classifier"))
    ]
    return names or ["a torch.nn.Dropout"]


def _drops(part: torch.nn.Module) -> bool:
    return any(_random(*pair) for pair in _rates(part))


def _rates(part: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    if isinstance(part, torch.nn.modules.dropout._DropoutNd):
        yield "dropout", part.p
    yield from vars(part).items()


def _random(name: str, value: Any) -> bool:
    rate = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return rate and ("drop" in name or "jitter" in name or name == "layerdrop")
