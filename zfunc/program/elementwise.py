# SPDX-License-Identifier: Apache-2.0
"""Elementwise operators whose bits do not depend on where in a tensor an element is.

Kernels treat a tensor as vectors and a tail, and threads cut it anywhere, so an
operator may be run on slices, or on several tensors joined, only if vector and scalar
code agree to the last bit. Here are those that round once, by which they do. Left out
are multiplications fused with additions (``lerp``, ``addcmul``, addition with a factor:
where to round is the compiler's choice, and in bfloat16 it differs), transcendental
functions, powers but squares (``x**1.5`` differs), and ``maximum``, ``minimum`` and
``clamp`` by tensors (of 0 and -0 they return either). The unit tests compare the bits
of each operator on whole tensors with those on random slices, by one thread and two.
NaN is one value: which of its bit patterns comes out depends on the position.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final

import torch
from torch.fx import Node

aten: Final = torch.ops.aten


def _cast(x: torch.Tensor, *, out: torch.Tensor) -> None:
    out.copy_(x)


def _square(x: torch.Tensor, _: Any, *, out: torch.Tensor) -> None:
    torch.mul(x, x, out=out)


# How each is called with a place for its result. (torch's bindings cost half as much
# a call as torch.ops, as does a 0-d tensor in the place of a number.)
OUT: Final[MappingProxyType[Any, Callable[..., Any]]] = MappingProxyType(
    {
        aten._to_copy.default: _cast,
        aten.abs.default: torch.abs,
        aten.add.Scalar: torch.add,
        aten.add.Tensor: torch.add,
        aten.clamp.default: torch.clamp,
        aten.div.Scalar: torch.div,
        aten.div.Tensor: torch.div,
        aten.eq.Scalar: torch.eq,
        aten.eq.Tensor: torch.eq,
        aten.ge.Scalar: torch.ge,
        aten.ge.Tensor: torch.ge,
        aten.gt.Scalar: torch.gt,
        aten.gt.Tensor: torch.gt,
        aten.le.Scalar: torch.le,
        aten.le.Tensor: torch.le,
        aten.lt.Scalar: torch.lt,
        aten.lt.Tensor: torch.lt,
        aten.mul.Scalar: torch.mul,
        aten.mul.Tensor: torch.mul,
        aten.ne.Scalar: torch.ne,
        aten.ne.Tensor: torch.ne,
        aten.neg.default: torch.neg,
        aten.pow.Tensor_Scalar: _square,
        aten.reciprocal.default: torch.reciprocal,
        aten.rsub.Scalar: aten.rsub.Scalar_out,
        aten.sign.default: torch.sign,
        aten.sqrt.default: torch.sqrt,
        aten.sub.Scalar: torch.sub,
        aten.sub.Tensor: torch.sub,
        aten.where.self: torch.where,
    }
)
# Those that read a number as a 0-d tensor of the result's dtype has it.
_NUMBERS_AS_TENSORS: Final = frozenset(
    {
        aten.add.Scalar,
        aten.add.Tensor,
        aten.div.Scalar,
        aten.div.Tensor,
        aten.mul.Scalar,
        aten.mul.Tensor,
        aten.sub.Scalar,
        aten.sub.Tensor,
    }
)
_WIDE: Final = frozenset({torch.float32, torch.float64})
_DTYPES: Final = _WIDE | {torch.float16, torch.bfloat16, torch.bool}


def is_elementwise(node: Node) -> bool:
    """True for a call on tensors of its result's shape, on 0-d ones and on numbers.

    Not for 0-d results: with another number of dims they could be of another dtype.
    """
    value = node.meta.get("val")
    if node.op != "call_function" or node.target not in OUT:
        return False
    if not isinstance(value, torch.Tensor) or not value.dim() or not value.numel():
        return False
    return _plain_arguments(node) and all(
        _fits(n.meta.get("val"), value) for n in node.all_input_nodes
    )


def _fits(operand: Any, result: torch.Tensor) -> bool:
    if not isinstance(operand, torch.Tensor):
        return False
    if operand.dim() and (operand.shape, operand.device) != (
        result.shape,
        result.device,
    ):
        return False
    return operand.dtype in _DTYPES and result.dtype in _DTYPES


def _plain_arguments(node: Node) -> bool:
    if node.target is aten._to_copy.default:
        return set(node.kwargs) <= {"dtype"}
    if node.target is aten.pow.Tensor_Scalar and node.args[1] != 2:
        return False
    if any(isinstance(arg, (list, tuple)) for arg in node.args):
        return False
    return all(key == "alpha" and alpha == 1 for key, alpha in node.kwargs.items())


def number(target: Any, value: Any, dtype: torch.dtype) -> Any:
    """A number as the quickest argument that gives the same bits."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if plain and target in _NUMBERS_AS_TENSORS and dtype in _WIDE:
        return torch.tensor(value, dtype=dtype)
    return value
