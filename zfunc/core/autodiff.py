# SPDX-License-Identifier: Apache-2.0
"""Differentiation: a lean ``value_and_grad`` and a ``remat`` that composes with it.

``torch.func.grad`` always builds the graph of the backward too (``create_graph=True``):
it keeps every activation, twice the memory, and recomputing saves nothing. Here the
pullback of ``torch.func.vjp`` is called without it, unless an outer transform needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.fx.traceback import annotate

from zfunc.core.errors import LossError
from zfunc.core.tree import (
    PyTree,
    check_floating,
    tree_flatten,
    tree_map,
    tree_unflatten,
)


def nested_in_grad() -> bool:
    """True inside a torch.func transform that differentiates what runs now."""
    stack = get_interpreter_stack() or []
    return any(i.key() in (TransformType.Grad, TransformType.Jvp) for i in stack)


def value_and_grad(
    f: Callable[..., Any], *, has_aux: bool = False
) -> Callable[..., tuple[Any, PyTree]]:
    r"""The value of a scalar function and its gradient by its first argument.

    :math:`(f(p), \nabla_p f(p))`, in JAX's order. ``f(params, *args)`` returns a 0-d
    floating tensor, or ``(scalar, aux)`` with ``has_aux``; then the value is that pair.
    ``params`` is any pytree of floating tensors; leaves that ``f`` does not use get
    zeros. Gradients have the structure, shapes and dtypes of ``params``.

    Differs from ``torch.func.grad_and_value``: half the memory (see the module), and
    the order. It may be nested under torch.func transforms for higher derivatives; its
    results carry no plain-autograd graph.

    Raises:
      TypeError: a leaf that is not a floating tensor; the message has its path.
      LossError: ``f`` returns something that is not a scalar.

    Example:
      >>> value_and_grad(lambda p: (p["w"] ** 2).sum())({"w": torch.tensor([1.0, 2.0])})
      (tensor(5.), {'w': tensor([2., 4.])})
    """

    @functools.wraps(f)
    def wrapped(params: PyTree, *args: Any) -> tuple[Any, PyTree]:
        check_floating(params, "params")
        nested = nested_in_grad()
        leaves, spec = tree_flatten(params)
        if not leaves:
            raise TypeError("params has no leaves: there is nothing to differentiate.")
        # A graph at the base level would keep every activation alive; in a nested call
        # the view makes a parameter that is gathered at its first use a plain tensor.
        leaves = [x.view_as(x) if nested else x.detach() for x in leaves]
        aux_spec: list[Any] = []

        def flat(*tensors: torch.Tensor) -> Any:
            out = f(tree_unflatten(spec, tensors), *args)
            if has_aux and not (isinstance(out, tuple) and len(out) == 2):
                raise LossError("with has_aux the function must return (scalar, aux)")
            value, aux = out if has_aux else (out, ())
            _check_scalar(value)
            others, structure = tree_flatten(aux)
            where = [i for i, x in enumerate(others) if isinstance(x, torch.Tensor)]
            aux_spec.append((structure, others, where))
            return value, tuple(others[i] for i in where)

        vjp: Any = torch.func.vjp  # annotated without its has_aux form
        # Nor do modules in the closure, which plain autograd tracks, record anything.
        with torch.set_grad_enabled(nested and torch.is_grad_enabled()):
            with annotate({"phase": "forward"}):  # for the passes over a traced step
                value, pull, aux = vjp(flat, *leaves, has_aux=True)
            one = torch.ones_like(value)
            with annotate({"phase": "backward"}):
                grads = pull(one, retain_graph=nested, create_graph=nested)
        tree = tree_unflatten(spec, grads)
        structure, aux_leaves, where = aux_spec[0]
        for i, x in zip(where, aux, strict=True):
            aux_leaves[i] = x
        return (
            (value, tree_unflatten(structure, aux_leaves)) if has_aux else value
        ), tree

    return wrapped


def _check_scalar(value: Any) -> None:
    scalar = isinstance(value, torch.Tensor) and value.dim() == 0
    if not scalar or not value.is_floating_point():
        got = (
            f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
            if isinstance(value, torch.Tensor)
            else f"a {type(value).__name__}"
        )
        raise LossError(
            f"the function must return a floating 0-d tensor; it returned {got}. "
            "Reduce it, with .mean() or .sum()."
        )


def abstract(tree: PyTree) -> PyTree:
    """The tree with fake tensors: shapes, dtypes and devices without memory.

    All leaves share one FakeTensorMode; abstract together what is used together.

    Example:
      >>> abstract({"w": torch.ones(2, 3)})["w"].shape
      torch.Size([2, 3])
    """
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    return tree_map(mode.from_tensor, tree)


def eval_shape(f: Callable[..., Any], *args: PyTree) -> PyTree:
    """What ``f(*args)`` returns, as fake tensors: nothing is computed or sent.

    ``args`` may be real or abstract already. With a state on an ``AbstractMesh`` this
    runs a whole training step for any number of ranks.

    Example:
      >>> eval_shape(lambda x: x @ x.T, torch.ones(2, 3)).shape
      torch.Size([2, 2])
    """
    if torch._guards.detect_fake_mode(tree_flatten(args)[0]) is None:
        args = abstract(args)
    mode: Any = torch._guards.detect_fake_mode(tree_flatten(args)[0])
    if mode is None:
        raise TypeError("eval_shape needs a tensor among its arguments")
    with mode:
        return f(*args)
