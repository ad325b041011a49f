# SPDX-License-Identifier: Apache-2.0
"""An optimizer's whole step as one pass over memory, where a kernel for it is there.

A chain is a dozen elementwise calls, and each of them goes through memory: Adam's reads
and writes a parameter some thirty times. A ``Fused`` step computes the same bits, from
the gradient to the new parameter, in one pass. It is part of the transformation itself:
whoever writes ``adamw(3e-4)`` gets it, and a chain that ends in one has it too.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from zfunc.core.tree import PyTree, tree_leaves, tree_map
from zfunc.core.update import widen
from zfunc.kernels.adamw_cpu import WORTH_NUMEL
from zfunc.kernels.library import compute_dtype, runs_triton

Kernels = Literal["auto", "triton", "reference"]


class Fused(NamedTuple):
    """A step in one pass: ``params, moments`` from the updates, without the updates.

    ``applies(params, updates)`` says, by dtypes and devices only, whether there is a
    kernel for such parameters and updates. ``step(updates, moments, params, finite,
    factor)`` returns the new parameters and moments; ``finite`` false leaves both as
    they are, ``factor`` is what the updates are multiplied by first (a clip's
    coefficient); either may be None.

    Laws:
      ``apply_updates(params, tx.update(...)[0])`` and its moments, bitwise.
    """

    applies: Callable[..., bool]
    step: Callable[..., tuple[PyTree, PyTree]]


def applies_to(
    name: str, kernels: Kernels, *, on_cpu: bool = False
) -> Callable[..., bool]:
    """Whether an optimizer's kernel runs, by what was asked for and the devices.

    Args:
      name: The optimizer, for messages.
      kernels: "auto" is Triton where all parameters are on one CUDA device, and the
        updates are of the dtypes that the kernel takes; "triton" insists; "reference"
        is the chain of elementwise calls.
      on_cpu: Whether "auto" has a pass for large trees on a CPU too.

    Returns:
      ``(params, updates) -> bool``; it raises ``ValueError`` where "triton" cannot be
      had.

    Raises:
      ValueError: Another ``kernels``.

    Examples:
      >>> applies_to("adamw", "auto")({"w": torch.ones(2)})
      False
    """
    if kernels not in get_args(Kernels):
        raise ValueError(
            f"{name}: kernels is {kernels!r}, expected 'auto', 'triton' or "
            "'reference'; leave it out for 'auto'"
        )

    def applies(params: PyTree, updates: PyTree = ()) -> bool:
        leaves = tree_leaves(params)
        if kernels == "reference" or not leaves:
            return False
        if kernels == "triton":
            return bool(runs_triton(name, kernels, *leaves))
        # Every step asks: what is quick to say first, leaf by leaf only if need be.
        device = leaves[0].device
        if device.type == "cpu":
            there = on_cpu and _is_worth_it(leaves)
        else:
            there = device.type == "cuda"
        return (
            there
            and all(x.device == device for x in leaves)
            and _are_alike(leaves, tree_leaves(updates))
        )

    return applies


def _are_alike(params: Sequence[Tensor], updates: Sequence[Tensor]) -> bool:
    """Whether arithmetic on each of the updates is in the dtype of its parameter's."""
    return all(
        u.is_floating_point() and compute_dtype(u.dtype) == compute_dtype(p.dtype)
        for p, u in zip(params, updates, strict=False)
    )


def _is_worth_it(leaves: Sequence[Tensor]) -> bool:
    """Whether a pass over such tensors on a CPU is worth a call; not under vmap."""
    if sum(x.numel() for x in leaves) < WORTH_NUMEL:
        return False
    return not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in leaves)


def chained(parts: Sequence[Any], check: Callable[[PyTree], None]) -> Fused | None:
    """The fused step of a chain: that of its last part, on what the others make of it.

    A factor for all updates right before the last part, such as a clip's, is not a pass
    of its own.

    Args:
      parts: Transformations.
      check: Raises unless it is given the moments of these parts.

    Returns:
      The step, or None where the last part has none.
    """
    if not parts or parts[-1].fused is None:
        return None
    last, firsts = parts[-1].fused, parts[:-1]
    factor_of = firsts[-1].factor if firsts else None

    def step(
        updates: PyTree,
        moments: PyTree,
        params: PyTree,
        finite: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> tuple[PyTree, PyTree]:
        check(moments)
        if factor is not None and firsts:
            updates, factor = scaled(updates, factor), None
        after = []
        for i, (part, before) in enumerate(zip(firsts, moments[:-1], strict=True)):
            if i == len(firsts) - 1 and factor_of is not None and _is_unit(before):
                factor = factor_of(updates)
                after.append(())
            else:
                updates, new = part.update(updates, before, params)
                after.append(chosen(finite, new, before))
        params, new = last.step(updates, moments[-1], params, finite, factor)
        return params, (*after, new)

    return Fused(last.applies, step)


def _is_unit(moments: PyTree) -> bool:
    """Whether they are those of a part without any; others are for it to refuse."""
    return type(moments) is tuple and not moments


def scaled(updates: PyTree, factor: Tensor) -> PyTree:
    """All updates times a 0-d factor, in float32 at least.

    Args:
      updates: Floating tensors.
      factor: 0-d, rounded to the dtype of the arithmetic.

    Examples:
      >>> scaled([torch.ones(2)], torch.tensor(0.5))
      [tensor([0.5000, 0.5000])]
    """

    def one(u: Tensor) -> Tensor:
        wide = widen(u)
        return wide * factor.to(wide.dtype)

    return tree_map(one, updates)


def chosen(finite: Tensor | None, new: PyTree, old: PyTree) -> PyTree:
    """``new`` where ``finite`` is None or true, else ``old``.

    Examples:
      >>> chosen(torch.tensor(False), [torch.ones(1)], [torch.zeros(1)])
      [tensor([0.])]
    """
    if finite is None:
        return new
    return tree_map(lambda n, o: torch.where(finite, n, o), new, old)
