# SPDX-License-Identifier: Apache-2.0
"""``precision``: the dtype of the loss's arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch

from zfunc.core.state import Mean
from zfunc.core.step import LossFn, Samples, Tally, TrainStep, Transform, named
from zfunc.core.tree import PyTree, tree_map
from zfunc.transforms.gathered import cast_leaf

_DTYPES: Final = MappingProxyType(
    {
        "bf16": torch.bfloat16,
        "f32": torch.float32,
        "f64": torch.float64,
    }
)
_ALIASES: Final = MappingProxyType(
    {
        "fp32": "f32",
        "float32": "f32",
        "bfloat16": "bf16",
        "float64": "f64",
        "fp64": "f64",
    }
)


@dataclass(frozen=True)
class Policy:
    """The dtype a loss computes in, and the dtype of what it returns.

    Storage is ``shard``'s, the wire is ``partition``'s: three dtypes, three owners.
    ``str(policy)`` and ``Policy.parse`` are inverse to each other.

    Example:
      >>> Policy.parse("compute=bf16")
      Policy(compute=torch.bfloat16, output=torch.float32)
      >>> str(Policy.parse("bf16"))
      'compute=bf16,output=f32'
    """

    compute: torch.dtype
    output: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name in ("compute", "output"):
            if getattr(self, name) not in _DTYPES.values():
                raise ValueError(
                    f"precision: {name} is {getattr(self, name)}; it must be one of "
                    f"{', '.join(_DTYPES)}. (float16 needs loss scaling, which zfunc "
                    "does not have: use bf16.)"
                )

    def __str__(self) -> str:
        names = {dtype: name for name, dtype in _DTYPES.items()}
        return f"compute={names[self.compute]},output={names[self.output]}"

    @staticmethod
    def parse(text: str) -> Policy:
        """A policy from ``"bf16"`` or ``"compute=bf16,output=f32"``.

        Raises:
          ValueError: an unknown key or dtype, or one key twice.
        """
        if "=" not in text:
            text = f"compute={text}"
        found: dict[str, torch.dtype] = {}
        for part in text.split(","):
            key, _, value = part.strip().partition("=")
            value = _ALIASES.get(value, value)
            if key == "params":
                raise ValueError(
                    "precision: the storage dtype belongs to the state: "
                    "zf.shard(params, mesh, dtype=...)"
                )
            if key not in ("compute", "output") or key in found or value not in _DTYPES:
                raise ValueError(
                    f"precision: cannot read {part.strip()!r} in {text!r}; expected "
                    "'bf16', 'fp32' or 'compute=DTYPE,output=DTYPE' with DTYPE one of "
                    f"{', '.join(_DTYPES)}. (float16 needs loss scaling, which zfunc "
                    "does not have: use bf16.)"
                )
            found[key] = _DTYPES[value]
        if "compute" not in found:
            raise ValueError(f"precision: {text!r} names no compute dtype")
        return Policy(**found)


def precision(policy: Policy | str) -> Transform:
    """Compute the loss in ``policy.compute`` and return it in ``policy.output``.

    Floating leaves of the parameters and of the batch are cast on entry (inside
    autodiff, so gradients have the storage dtype); gradients add up in float32 at
    least. Keep counts and weights that must stay exact as integers: those are not
    cast. Replaces the slot ``loss``; commutes with the other transformations.

    Args:
      policy: ``"bf16"``, ``"fp32"``, ``"compute=bf16,output=f32"`` or a ``Policy``.

    Raises:
      ValueError: an unknown policy. (Not float16: it needs loss scaling.)
      TypeError: something else than a string or a policy.

    Differs from DeepSpeed: the master weights are the state, so there is no second
    copy; from ``torch.autocast``: one dtype for the whole loss, chosen by the caller.

    References:
      Micikevicius et al., `Mixed precision training
      <https://arxiv.org/abs/1710.03740>`_, 2018.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(
      ...     lambda p, b: (p * b).sum(), zf.optim.sgd(1.0), zf.precision("bf16")
      ... )
      >>> step(zf.shard(torch.ones(1), zf.make_mesh({})), torch.ones(1)).grads.buffer
      tensor([1.])
    """
    if isinstance(policy, str):
        policy = Policy.parse(policy)
    if not isinstance(policy, Policy):
        raise TypeError(f"precision takes a string or a Policy, got {policy!r}")
    chosen = policy

    def transform(step: TrainStep) -> TrainStep:
        if getattr(step.loss, "__name__", "").startswith("precision("):
            raise ValueError(
                f"this step has a precision already ({step.loss.__name__}): the inner "
                "one would decide alone. Give one policy."
            )
        name = f"precision({chosen}) . {getattr(step.loss, '__name__', 'loss')}"
        return step._replace(loss=named(_in_precision(step.loss, chosen), name))

    return named(transform, f"precision({chosen})")


def _in_precision(loss: LossFn, policy: Policy) -> LossFn:
    def cast(x: Any) -> Any:
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        return cast_leaf(x, policy.compute) if floating else x

    def cast_loss(params: PyTree, batch: PyTree, samples: Samples) -> Tally:
        tally = loss(tree_map(cast, params), tree_map(cast, batch), samples)
        total = tally.loss.total  # rounded to the output dtype, but not added up in it
        rounded = total.to(policy.output).to(total.dtype)
        return Tally(Mean(rounded, tally.loss.weight), tally.aux)

    return cast_loss
