# SPDX-License-Identifier: Apache-2.0
r"""RMSNorm: rows divided by their root mean square, with the residual sum before it.

.. math::
  y = r \, h \, s, \quad h = x + \mathrm{residual}, \quad
  r = (\mathrm{mean}(h^2) + \epsilon)^{-1/2}, \qquad
  \bar h_{in} = r \, (g - \hat h \, \mathrm{mean}(g \hat h)) + \bar h, \quad
  g = \bar y \, s, \quad \hat h = r h

Bytes per element, in bfloat16: forward 1 read and 1 written (4 B), with the residual 2
and 2 (8 B); backward 2 read and 1 written (6 B), with the cotangent of the sum 3 and 1
(8 B). One float32 per row is kept for the backward, which reads it, and h.
"""

from collections.abc import Sequence
from typing import Any, Final, overload

import torch
from torch import Tensor

from . import norm_rows
from .library import (
    FirstOrder,
    Kernel,
    applied,
    compute_dtype,
    define,
    looped,
    pullback,
    runs_triton,
)
from .norm_configurations import configurations


def rms_norm_reference(x: Tensor, scale: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x**2) + eps) * scale`` in float32 at least, rounded once.

    Args:
      x: ``[..., D]``, any floating dtype.
      scale: ``[D]``, or None for 1.
      eps: Added to the mean square.
    """
    wide = x.to(compute_dtype(x.dtype))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if scale is None else wide * scale).to(x.dtype)


def _forward(
    x: Tensor, residual: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, _, rstd = norm_rows.forward(x, residual, scale, None, eps, False)
    return y, total, rstd


def _forward_like(
    x: Tensor, residual: Tensor | None, scale: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total, _, rstd = norm_rows.forward_like(x, residual, False)
    return y, total, rstd


def _forward_mapped(info: Any, in_dims: Any, *args: Any) -> Any:
    x, residual, scale, eps = args
    if in_dims[2] is not None:
        return looped(lambda: forward_op)(info, in_dims, *args)
    x, residual = norm_rows.rows_first(info, in_dims[:2], (x, residual))
    return forward_op(x, residual, scale, eps), (0, 0, 0)


def _backward(
    grad: Tensor,
    total_grad: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    groups: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return norm_rows.backward(grad, total_grad, x, None, rstd, scale, None, groups)[:2]


def _backward_like(
    grad: Tensor,
    total_grad: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    groups: Sequence[int],
) -> tuple[Tensor, Tensor]:
    return norm_rows.backward_like(x, scale, None, groups, False)[:2]


def _backward_mapped(info: Any, in_dims: Any, *args: Any) -> Any:
    if in_dims[4] is not None:
        return looped(lambda: backward_op)(info, in_dims, *args)
    rows = norm_rows.rows_first(info, in_dims[:4], args[:4])
    return backward_op(*rows, args[4], [info.batch_size, *args[5]]), (0, 0)


forward_op: Final = define(
    "rms_norm_forward(Tensor x, Tensor? residual, Tensor? scale, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_like,
    vmap=_forward_mapped,
)
backward_op: Final = define(
    "rms_norm_backward(Tensor grad, Tensor? total_grad, Tensor x, Tensor rstd, "
    "Tensor? scale, int[] groups) -> (Tensor, Tensor)",
    _backward,
    fake=_backward_like,
    vmap=_backward_mapped,
)
_transposed: Final = pullback(backward_op)


class _RMSNorm(FirstOrder):
    """The two operators as a function and its transpose."""

    @staticmethod
    def forward(
        x: Tensor, residual: Tensor | None, scale: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return forward_op(x, residual, scale, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, residual, scale, _ = inputs
        _, total, rstd = output
        ctx.added = residual is not None
        ctx.save_for_backward(total if ctx.added else x, rstd, scale)
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Any, total_grad: Any, _: Any) -> Any:
        x, rstd, scale = ctx.saved_tensors
        if grad is None:
            return total_grad, total_grad if ctx.added else None, None, None
        if not ctx.added:
            total_grad = None
        x_grad, scale_grad = _transposed(grad, total_grad, x, rstd, scale, ())
        return (
            x_grad,
            x_grad if ctx.added else None,
            None if scale is None else scale_grad,
            None,
        )


_applied: Final = applied(_RMSNorm)


@overload
def rms_norm(
    x: Tensor,
    scale: Tensor | None,
    eps: float = ...,
    *,
    residual: None = ...,
    kernel: Kernel = ...,
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor,
    scale: Tensor | None,
    eps: float = ...,
    *,
    residual: Tensor,
    kernel: Kernel = ...,
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,
    scale: Tensor | None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Root-mean-square norm, :math:`h / \sqrt{\mathrm{mean}(h^2) + \epsilon} \cdot s`.

    Args:
      x: ``[..., D]``; statistics in float32 (float64 for float64).
      scale: The scale s, ``[D]``, of any floating dtype, or None for 1.
      eps: Added to the mean square.
      residual: Like ``x``; h is then ``x + residual``, rounded to the dtype of x.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      A tensor like ``x``, rounded once; with a residual, the pair of it and h.

    Raises:
      TypeError: An argument that is not a floating tensor; a residual of another dtype.
      ValueError: Shapes or devices that do not fit; a negative eps; a ``kernel`` that
        is not there.
      RuntimeError: A second derivative of the Triton kernel.

    Laws:
      ``rms_norm(x, s, residual=r)`` is ``(rms_norm(x + r, s), x + r)``.

    Examples:
      >>> rms_norm(torch.tensor([3.0, -3.0]), torch.ones(2), eps=0.0)
      tensor([ 1., -1.])
      >>> y, total = rms_norm(torch.ones(2), torch.ones(2), residual=torch.ones(2))
      >>> total
      tensor([2., 2.])

    References:
      Zhang and Sennrich, `RMSNorm <https://arxiv.org/abs/1910.07467>`_, 2019.

    Differs from:
      Hugging Face's Llama rounds to the dtype of ``x`` before it multiplies by the
      scale; here the result is rounded once.
    """
    norm_rows.check("rms_norm", x, residual, scale, None, eps)
    if runs_triton("rms_norm", kernel, x, residual, scale):
        y, total, _ = _applied(x, residual, scale, float(eps))
        return y if residual is None else (y, total)
    if residual is None:
        return rms_norm_reference(x, scale, eps)
    total = x + residual
    return rms_norm_reference(total, scale, eps), total


CONFIGURATIONS: Final = configurations("rms_norm", centred=False)
