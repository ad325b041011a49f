# SPDX-License-Identifier: Apache-2.0
"""``precision``: the dtype of the loss's arithmetic, and the scale of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

import torch

from zfunc.core.state import Mean
from zfunc.core.step import TrainStep, Transform
from zfunc.core.tally import LossFn, Samples, Tally, named
from zfunc.core.tree import PyTree, tree_map
from zfunc.transforms.gathered import cast_leaf
from zfunc.transforms.loss_scale import DynamicLossScale, StaticLossScale

_DTYPES: Final = MappingProxyType(
    {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "f32": torch.float32,
        "f64": torch.float64,
    }
)
_ALIASES: Final = MappingProxyType(
    {
        "fp32": "f32",
        "float32": "f32",
        "bfloat16": "bf16",
        "float16": "fp16",
        "f16": "fp16",
        "float64": "f64",
        "fp64": "f64",
    }
)

LossScaling = DynamicLossScale | StaticLossScale


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
                    f"{', '.join(_DTYPES)}."
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
                    "'bf16', 'fp16', 'fp32' or 'compute=DTYPE,output=DTYPE' with DTYPE "
                    "one of "
                    f"{', '.join(_DTYPES)}."
                )
            found[key] = _DTYPES[value]
        if "compute" not in found:
            raise ValueError(f"precision: {text!r} names no compute dtype")
        return Policy(**found)


def precision(
    policy: Policy | str,
    *,
    loss_scale: float | Literal["dynamic"] | LossScaling | None = None,
) -> Transform:
    r"""Compute the loss in ``policy.compute`` and return it in ``policy.output``.

    Floating leaves of the parameters and of the batch are cast on entry (inside
    autodiff, so gradients have the storage dtype); gradients add up in float32 at
    least. Keep counts and weights that must stay exact as integers: those are not
    cast. Replaces the slot ``loss``; commutes with the other transformations.

    With a loss scale s, :math:`s \cdot t` is differentiated in the place of the total
    t, and gradients are divided by s after they were reduced, in float32. A step whose
    gradients have no finite norm over all ranks changes no parameter and no moment (so
    schedules stand still) on any rank, and is counted in
    ``state.loss_scale.skipped_steps`` and ``state.metrics.skipped``; ``state.step``
    counts batches and goes on.

    Args:
      policy: ``"bf16"``, ``"fp16"``, ``"fp32"``, ``"compute=bf16,output=f32"`` or a
        ``Policy``.
      loss_scale: a number (``StaticLossScale``), ``"dynamic"`` or a
        ``DynamicLossScale``. Default: dynamic for float16, none for other dtypes.

    Raises:
      ValueError: an unknown policy, a scale that is not above 0, or a second one.
      TypeError: something else than a string or a policy, or than a scale.

    Laws: without an overflow, a scale that is a power of two changes no bit of a
    float32 step. An overflow on one rank leaves parameters, moments and key as they
    were, bitwise, on all.

    Differs from DeepSpeed: the master weights are the state, so there is no second
    copy; a loss that returns ``Mean(total, weight)`` is scaled before it is divided by
    its weight, so dynamic scales settle lower by about that weight; from
    ``torch.autocast``: one dtype for the whole loss, chosen by the caller.

    References:
      Micikevicius et al., `Mixed precision training
      <https://arxiv.org/abs/1710.03740>`_, 2018.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(
      ...     lambda p, b: (p * b).sum(),
      ...     zf.optim.sgd(1.0),
      ...     zf.precision("fp16", loss_scale=2.0**10),
      ... )
      >>> state = step(zf.shard(torch.ones(1), zf.make_mesh({})), torch.ones(1))
      >>> state.grads.buffer, state.loss_scale.scale
      (tensor([1.]), tensor(1024.))
    """
    if isinstance(policy, str):
        policy = Policy.parse(policy)
    if not isinstance(policy, Policy):
        raise TypeError(f"precision takes a string or a Policy, got {policy!r}")
    chosen, scaling = policy, _scaling(policy, loss_scale)

    def transform(step: TrainStep) -> TrainStep:
        if getattr(step.loss, "__name__", "").startswith("precision("):
            raise ValueError(
                f"this step has a precision already ({step.loss.__name__}): the inner "
                "one would decide alone. Give one policy."
            )
        name = f"precision({chosen}) . {getattr(step.loss, '__name__', 'loss')}"
        step = step._replace(loss=named(_in_precision(step.loss, chosen), name))
        return step if scaling is None else step._replace(scaling=scaling)

    return named(transform, f"precision({chosen})")


def skip_nonfinite() -> Transform:
    """Leave out the update of a step whose gradients are not finite on some rank.

    Parameters and moments stay as they were, bitwise, on all ranks; the step is counted
    in ``state.loss_scale.skipped_steps`` and ``state.metrics.skipped``. No host sync.
    A step with a loss scale does this already, and stays as it is.

    Differs from DeepSpeed: its ``check_grad_overflow`` is for bfloat16 alone.

    Example:
      >>> import zfunc as zf
      >>> step = zf.train_step(
      ...     lambda p, b: (p * b).sum(), zf.optim.sgd(1.0), zf.skip_nonfinite()
      ... )
      >>> state = zf.shard(torch.ones(1), zf.make_mesh({}))
      >>> state = step(state, torch.tensor([torch.inf]))
      >>> state.params.buffer, state.metrics.skipped
      (tensor([1.]), tensor(1))
    """

    def transform(step: TrainStep) -> TrainStep:
        if step.scaling is not None:
            return step
        return step._replace(scaling=StaticLossScale(1.0))

    return named(transform, "skip_nonfinite()")


def _scaling(policy: Policy, loss_scale: Any) -> LossScaling | None:
    match loss_scale:
        case None if policy.compute == torch.float16:
            return DynamicLossScale()
        case None | DynamicLossScale() | StaticLossScale():
            return loss_scale
        case "dynamic":
            return DynamicLossScale()
        case bool() | str():
            pass
        case int() | float():
            return StaticLossScale(float(loss_scale))
    raise TypeError(
        f"precision: loss_scale is {loss_scale!r}, expected a number, 'dynamic' or a "
        "zf.DynamicLossScale(...); type for example loss_scale=2.0**16"
    )


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
