# SPDX-License-Identifier: Apache-2.0
r"""LayerNorm: rows centred and divided by their deviation, after a residual sum.

.. math::
  y = \hat h \, s + b, \quad \hat h = r \, (h - \mu), \quad
  h = x + \mathrm{residual}, \quad \mu = \mathrm{mean}(h), \quad
  r = (\mathrm{mean}((h - \mu)^2) + \epsilon)^{-1/2}, \qquad
  \bar h_{in} = r \, (g - \mathrm{mean}(g) - \hat h \, \mathrm{mean}(g \hat h))
  + \bar h, \quad g = \bar y \, s

Bytes per element, in bfloat16: forward 1 read and 1 written (4 B), with the residual 2
and 2 (8 B); backward 2 read and 1 written (6 B), with the cotangent of the sum 3 and 1
(8 B). Two float32 per row, mean and r, are kept for the backward, and h. The squares
are of the centred row: mean(h^2) - mean(h)^2 would cancel.
"""

from collections.abc import Sequence
from typing import Any, Final, overload

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
from .rms_norm import rms_norm_reference


def layer_norm_reference(
    x: Tensor, scale: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """The centred row through ``rms_norm_reference``, plus bias, rounded once.

    Args:
      x: ``[..., D]``, any floating dtype.
      scale: ``[D]``, or None for 1.
      bias: ``[D]``, or None for 0.
      eps: Added to the variance.
    """
    wide = x.to(compute_dtype(x.dtype))
    wide = wide - wide.mean(-1, keepdim=True)
    wide = rms_norm_reference(wide, scale, eps)
    return (wide if bias is None else wide + bias).to(x.dtype)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return norm_rows.forward(x, residual, scale, bias, eps, True)


def _forward_like(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return norm_rows.forward_like(x, residual, True)


def _forward_mapped(info: Any, in_dims: Any, *args: Any) -> Any:
    if in_dims[2] is not None or in_dims[3] is not None:
        return looped(lambda: forward_op)(info, in_dims, *args)
    rows = norm_rows.rows_first(info, in_dims[:2], args[:2])
    return forward_op(*rows, *args[2:]), (0, 0, 0, 0)


def _backward_mapped(info: Any, in_dims: Any, *args: Any) -> Any:
    # Of the bias only the dtype counts, mapped or not.
    if in_dims[5] is not None:
        return looped(lambda: backward_op)(info, in_dims, *args)
    rows = norm_rows.rows_first(info, in_dims[:5], args[:5])
    groups = [info.batch_size, *args[7]]
    return backward_op(*rows, *args[5:7], groups), (0, 0, 0)


def _backward_like(
    grad: Tensor,
    total_grad: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    groups: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_rows.backward_like(x, scale, bias, groups, True)


forward_op: Final = define(
    "layer_norm_forward(Tensor x, Tensor? residual, Tensor? scale, Tensor? bias, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    fake=_forward_like,
    vmap=_forward_mapped,
)
backward_op: Final = define(
    "layer_norm_backward(Tensor grad, Tensor? total_grad, Tensor x, Tensor mean, "
    "Tensor rstd, Tensor? scale, Tensor? bias, int[] groups) "
    "-> (Tensor, Tensor, Tensor)",
    norm_rows.backward,
    fake=_backward_like,
    vmap=_backward_mapped,
)
_transposed: Final = pullback(backward_op)


class _LayerNorm(FirstOrder):
    """The two operators as a function and its transpose."""

    @staticmethod
    def forward(
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return forward_op(x, residual, scale, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, residual, scale, bias, _ = inputs
        _, total, mean, rstd = output
        ctx.added = residual is not None
        ctx.save_for_backward(total if ctx.added else x, mean, rstd, scale, bias)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Any, total_grad: Any, *_: Any) -> Any:
        x, mean, rstd, scale, bias = ctx.saved_tensors
        if grad is None:
            return total_grad, total_grad if ctx.added else None, None, None, None
        if not ctx.added:
            total_grad = None
        x_grad, scale_grad, bias_grad = _transposed(
            grad, total_grad, x, mean, rstd, scale, bias, ()
        )
        return (
            x_grad,
            x_grad if ctx.added else None,
            None if scale is None else scale_grad,
            None if bias is None else bias_grad,
            None,
        )


_applied: Final = applied(_LayerNorm)


@overload
def layer_norm(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: None = ...,
    kernel: Kernel = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None = ...,
    eps: float = ...,
    *,
    residual: Tensor,
    kernel: Kernel = ...,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    kernel: Kernel = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Layer norm, :math:`(h - \mu) / \sqrt{\mathrm{var}(h) + \epsilon} \cdot s + b`.

    Args:
      x: ``[..., D]``; statistics in float32 (float64 for float64).
      scale: The scale s, ``[D]``, of any floating dtype, or None for 1.
      bias: The bias b, ``[D]``, of any floating dtype, or None for 0.
      eps: Added to the variance.
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
      ``layer_norm(x, s, b, residual=r)`` is ``(layer_norm(x + r, s, b), x + r)``.

    Examples:
      >>> import torch
      >>> layer_norm(torch.tensor([1.0, 3.0]), torch.ones(2), eps=0.0)
      tensor([-1.,  1.])
      >>> y, total = layer_norm(torch.ones(2), None, residual=torch.ones(2))
      >>> total
      tensor([2., 2.])

    References:
      Ba et al., `Layer Normalization <https://arxiv.org/abs/1607.06450>`_, 2016.

    Differs from:
      ``F.layer_norm`` takes the dtype of x for scale and bias, too; here a float32
      scale meets a bfloat16 x without a copy.
    """
    norm_rows.check("layer_norm", x, residual, scale, bias, eps)
    if runs_triton("layer_norm", kernel, x, residual, scale, bias):
        y, total, _, _ = _applied(x, residual, scale, bias, float(eps))
        return y if residual is None else (y, total)
    if residual is None:
        return layer_norm_reference(x, scale, bias, eps)
    total = x + residual
    return layer_norm_reference(total, scale, bias, eps), total


CONFIGURATIONS: Final = configurations("layer_norm", centred=True)
