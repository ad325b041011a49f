# SPDX-License-Identifier: Apache-2.0
"""A user's loss as a function of sums, which add up over microbatches and ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from zfunc.core.errors import LossError
from zfunc.core.random import fold_in
from zfunc.core.state import Mean
from zfunc.core.tree import PyTree, leaves_with_path, map_with_path, pytree

T = TypeVar("T")


class Samples(NamedTuple):
    """The step's key, and the index of each sample of the batch in the global batch.

    ``loss_scale`` multiplies the loss before it is differentiated; None: nothing does.
    """

    key: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment] # shadows tuple.index on purpose
    loss_scale: torch.Tensor | None = None


@pytree
class Tally:
    """What a loss returns, as sums: they add up over microbatches and ranks."""

    loss: Mean
    aux: PyTree


LossFn = Callable[[PyTree, PyTree, Samples], Tally]


def named(fn: T, name: str) -> T:
    """The function under the name that ``repr(step)`` shows."""
    fn.__name__ = fn.__qualname__ = name  # type: ignore[attr-defined]
    return fn


def sample_counts(batch: PyTree, what: str) -> dict[str, int]:
    """Dim 0 of each tensor of a batch, by path: one number, or a ``ValueError``."""
    sizes = {
        path: leaf.shape[0]
        for path, leaf in leaves_with_path(batch)
        if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0]
    }
    first = next(iter(sizes), "")
    for path, size in sizes.items():
        if size != sizes[first]:
            raise ValueError(
                f"{what}: batch[{path!r}] has {size} samples and batch[{first!r}] has "
                f"{sizes[first]}: what has not one row per sample is no part of the "
                "batch; close over it in the loss."
            )
    return sizes


def tallying(loss_fn: Callable[..., Any]) -> LossFn:
    """The user's loss as a function of sums."""
    key_name, takes_key = _key_parameter(loss_fn)

    def loss(params: PyTree, batch: PyTree, samples: Samples) -> Tally:
        if takes_key:
            sample_counts(batch, "one key per sample")
        keys = fold_in(samples.key, samples.index) if takes_key else None
        named_key = {key_name: keys} if key_name else {}
        third = (keys,) if takes_key and not key_name else ()
        out = loss_fn(params, batch, *third, **named_key)
        pair = isinstance(out, tuple) and len(out) == 2
        value, aux = out if pair else (out, {})
        return Tally(_mean(value, "the loss"), _aux_means(aux))

    return named(loss, getattr(loss_fn, "__name__", type(loss_fn).__name__))


def _key_parameter(fn: Callable[..., Any]) -> tuple[str | None, bool]:
    """The name that takes the key (None: the third position), and whether any does."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # builtins have none
        return None, False
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    for p in parameters:
        if (
            p.name in ("key", "keys")
            and p.kind is not inspect.Parameter.POSITIONAL_ONLY
        ):
            return p.name, True
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return None, len(required) >= 3


def _aux_means(aux: PyTree) -> PyTree:
    def is_mean(x: Any) -> bool:
        return isinstance(x, Mean)

    for path, leaf in leaves_with_path(aux, is_mean):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            raise LossError(
                f"aux[{path!r}] has shape {tuple(leaf.shape)}: metrics are scalars. "
                "Reduce it (.mean()), or return Mean(total, weight)."
            )
    return map_with_path(lambda p, x: _mean(x, f"aux[{p!r}]"), aux, is_mean)


def _mean(value: Any, what: str) -> Mean:
    """``value`` as a Mean of float32 or wider scalars; a plain scalar weighs 1."""
    if isinstance(value, (bool, int, float)) and what != "the loss":
        value = torch.tensor(float(value))
    mean = value if isinstance(value, Mean) else Mean(value, 1)  # type: ignore[arg-type]
    if not isinstance(mean.total, torch.Tensor) or mean.total.dim():
        got = (
            f"shape {tuple(mean.total.shape)}"
            if isinstance(mean.total, torch.Tensor)
            else f"a {type(mean.total).__name__}"
        )
        raise LossError(
            f"{what} must be a 0-d tensor or Mean(total, weight), got {got}: reduce "
            "it, with .mean() or .sum()."
        )
    if what == "the loss" and not mean.total.is_floating_point():
        raise LossError(f"the loss must be floating, got {mean.total.dtype}")
    weight: Any = mean.weight
    if not isinstance(weight, (torch.Tensor, int, float)):
        raise LossError(
            f"{what}: the weight of a Mean is a 0-d tensor or a number, got a "
            f"{type(weight).__name__}"
        )
    if not isinstance(weight, torch.Tensor):  # made on the device: a copy would sync
        weight = torch.full((), weight, dtype=torch.float32, device=mean.total.device)
    if weight.dim():
        raise LossError(f"{what}: the weight of a Mean is 0-d, got {weight.shape}")
    if weight.requires_grad:
        raise LossError(
            f"{what}: the weight of a Mean depends on the parameters, and its gradient "
            "would be dropped: make it from the batch alone and outside of remat, or "
            "detach it."
        )
    wide = torch.promote_types(mean.total.dtype, torch.float32)
    return Mean(mean.total.to(wide), weight.to(wide))
