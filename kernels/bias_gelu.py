# SPDX-License-Identifier: Apache-2.0
r"""GELU of a sum with a bias, and the bias's gradient.

.. math::
  h = x + b, \qquad y = h \, \Phi(h), \qquad
  \bar x = \bar y \, (\Phi(h) + h \, \varphi(h)), \qquad
  \bar b = \sum_\mathrm{rows} \bar x

with the normal distribution :math:`\Phi` and density :math:`\varphi`, or with the
sigmoid of :math:`2 \sqrt{2 / \pi} \, (h + 0.044715 h^3)` in the place of :math:`\Phi`.

Bytes per element, in elements of the dtype: forward 1 read and 1 written (4 B in
bfloat16), backward 2 read and 1 written (6 B). The sum h is computed again, not
stored, and the bias's gradient is added up on the way, before any rounding.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import gelu
from .columns import (
    Tiles,
    check_bias,
    configurations,
    finish,
    grouped,
    launch,
    merged,
    place,
    split,
)
from .gated import dense_like
from .geglu import Approximate, is_tanh
from .library import (
    FirstOrder,
    Kernel,
    check_floating,
    compute_dtype,
    define,
    pullback,
    runs_triton,
)


def bias_gelu_reference(
    x: Tensor, bias: Tensor, *, approximate: Approximate = "none"
) -> Tensor:
    """``gelu(x + bias)`` in float32 at least, rounded once.

    Args:
      x: ``[..., D]``, any floating dtype.
      bias: ``[D]``.
      approximate: "none", or "tanh".
    """
    dtype = compute_dtype(x.dtype)
    hidden = x.to(dtype) + bias.to(dtype)
    return torch.nn.functional.gelu(hidden, approximate=approximate).to(x.dtype)


@triton.jit
def _forward_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    span,
    TANH: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, _, begin, end, col = place(rows, columns, span, COLS)
    bias = tl.load(bias_ptr + group * columns + col, col < columns, 0.0).to(WIDE)
    row = begin + tl.arange(0, ROWS)
    inside = (row < end)[:, None] & (col < columns)[None, :]
    at = (group * rows + row)[:, None] * columns + col[None, :]
    hidden = tl.load(x_ptr + at, inside, 0.0).to(WIDE) + bias[None, :]
    out = gelu(hidden, TANH)[0]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    x_ptr,
    bias_ptr,
    x_grad_ptr,
    partial_ptr,
    rows,
    columns,
    span,
    TANH: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, part, begin, end, col = place(rows, columns, span, COLS)
    bias = tl.load(bias_ptr + group * columns + col, col < columns, 0.0).to(WIDE)
    total = tl.zeros([ROWS, COLS], WIDE)
    while begin < end:
        row = begin + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (col < columns)[None, :]
        at = (group * rows + row)[:, None] * columns + col[None, :]
        grad = tl.load(grad_ptr + at, inside, 0.0).to(WIDE)
        hidden = tl.load(x_ptr + at, inside, 0.0).to(WIDE) + bias[None, :]
        x_grad = grad * gelu(hidden, TANH)[1]
        tl.store(x_grad_ptr + at, x_grad.to(x_grad_ptr.dtype.element_ty), inside)
        total += x_grad
        begin += ROWS
    tl.store(partial_ptr + part * columns + col, tl.sum(total, 0), col < columns)


def _forward(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    out = dense_like(x)
    if out.numel() > 0:
        tiles = Tiles.of(*x.shape)
        launch(_forward_kernel, (x, bias), (out,), tiles, tiles.rows, TANH=tanh)
    return out


def _backward(
    grad: Tensor, x: Tensor, bias: Tensor, tanh: bool
) -> tuple[Tensor, Tensor]:
    x_grad = dense_like(x)
    if x_grad.numel() == 0:
        return x_grad, bias.new_zeros(bias.shape)
    tiles = Tiles.of(*x.shape)
    partial = tiles.partial(x)
    outputs = x_grad, partial
    launch(_backward_kernel, (grad, x, bias), outputs, tiles, tiles.span, TANH=tanh)
    return x_grad, finish(partial, bias.dtype)


forward_op: Final = define(
    "bias_gelu_forward(Tensor x, Tensor bias, bool tanh) -> Tensor",
    _forward,
    fake=lambda x, bias, tanh: dense_like(x),
    vmap=lambda info, dims, *xs: (
        split(info, forward_op(*merged(info, dims, xs))),
        0,
    ),
)
backward_op: Final = define(
    "bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, bool tanh)"
    " -> (Tensor, Tensor)",
    _backward,
    fake=lambda grad, x, bias, tanh: (dense_like(x), dense_like(bias)),
    vmap=lambda info, dims, *xs: (
        tuple(split(info, y) for y in backward_op(*merged(info, dims, xs))),
        (0, 0),
    ),
)
_transposed: Final = pullback(backward_op)


class _BiasGELU(FirstOrder):
    """The two operators as a function and its transpose."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
        return forward_op(x, bias, tanh)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, bias, ctx.tanh = inputs
        ctx.save_for_backward(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_transposed(grad, *ctx.saved_tensors, ctx.tanh), None


def bias_gelu(
    x: Tensor,
    bias: Tensor,
    *,
    approximate: Approximate = "none",
    kernel: Kernel = "auto",
) -> Tensor:
    r"""GELU of a sum, :math:`h \, \Phi(h)` with :math:`h = x + b`.

    Args:
      x: ``[..., D]``, floating; computed in float32 (float64 for float64).
      bias: ``[D]``, of the dtype and device of ``x``.
      approximate: "none" is the normal distribution function by the error function,
        "tanh" its approximation by a tanh, of BERT and GPT-2.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      A tensor like ``x``, rounded once; contiguous from Triton.

    Raises:
      TypeError: An argument that is not a floating tensor, or two dtypes.
      ValueError: A ``bias`` of another shape; two devices; an ``approximate`` or
        ``kernel`` that is not there.
      RuntimeError: A second derivative of the Triton kernel.

    Laws:
      The Triton kernel is the formula within :math:`16 \epsilon \max(1, |h|)` and one
      rounding to the dtype, where :math:`\epsilon` is that of float32 (of float64 for
      float64). Equal inputs give equal bits, those of the bias's gradient too.

    Examples:
      >>> bias_gelu(torch.tensor([[0.0, 1.0]]), torch.tensor([1.0, -1.0]))
      tensor([[0.8413, 0.0000]])

    References:
      Hendrycks and Gimpel, `Gaussian Error Linear Units
      <https://arxiv.org/abs/1606.08415>`_, 2016.

    Differs from:
      ``torch.nn.functional.gelu(x + bias)`` rounds the sum to the dtype first, and is
      NaN at minus infinity, where the Triton kernel gives the limit 0.
    """
    check_floating("bias_gelu", x=x, bias=bias)
    check_bias("bias_gelu", x, bias)
    tanh = is_tanh("bias_gelu", approximate)
    if not runs_triton("bias_gelu", kernel, x, bias):
        return bias_gelu_reference(x, bias, approximate=approximate)
    out = _BiasGELU.apply(grouped(x), bias[None], tanh)
    return out.reshape(x.shape)


_KERNELS: Final = (
    ("forward", _forward_kernel, ("x_ptr", "bias_ptr", "out_ptr"), (), 1),
    (
        "backward",
        _backward_kernel,
        ("grad_ptr", "x_ptr", "bias_ptr", "x_grad_ptr"),
        ("partial_ptr",),
        2,
    ),
)
CONFIGURATIONS: Final = tuple(
    one
    for form, tanh in (("erf", False), ("tanh", True))
    for kind, kernel, pointers, sums, narrow in _KERNELS
    for one in configurations(
        f"bias_gelu/{kind}/{form}",
        kernel,
        pointers,
        {"TANH": tanh},
        narrow,
        dict.fromkeys(sums, "*fp32"),
    )
)
