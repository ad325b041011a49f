# SPDX-License-Identifier: Apache-2.0
r"""SwiGLU: the gated unit of Llama's MLP, elementwise.

.. math::
  y = g \, \sigma(g) \, u, \qquad
  \bar g = \bar y \, u \, \sigma(g) (1 + g (1 - \sigma(g))), \qquad
  \bar u = \bar y \, g \, \sigma(g)

Bytes per element, in elements of the dtype: forward 2 read and 1 written (6 B in
bfloat16), backward 3 read and 2 written (10 B). The backward computes the sigmoid
again instead of reading it.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import silu
from .gated import check_gated, configurations, dense_like, elementwise, mapped
from .library import FirstOrder, Kernel, compute_dtype, define, pullback, runs_triton


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` in float32 at least, rounded once.

    Args:
      gate: Any shape and floating dtype.
      up: Like ``gate``.
    """
    wide = compute_dtype(gate.dtype)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, out_ptr, numel, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    gate = tl.load(gate_ptr + at, inside, 0.0).to(WIDE)
    up = tl.load(up_ptr + at, inside, 0.0).to(WIDE)
    out = silu(gate)[0] * up
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    gate_grad_ptr,
    up_grad_ptr,
    numel,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    grad = tl.load(grad_ptr + at, inside, 0.0).to(WIDE)
    gate = tl.load(gate_ptr + at, inside, 0.0).to(WIDE)
    up = tl.load(up_ptr + at, inside, 0.0).to(WIDE)
    opened, slope = silu(gate)
    gate_grad = grad * up * slope
    up_grad = grad * opened
    tl.store(gate_grad_ptr + at, gate_grad.to(gate_grad_ptr.dtype.element_ty), inside)
    tl.store(up_grad_ptr + at, up_grad.to(up_grad_ptr.dtype.element_ty), inside)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    return elementwise(_forward_kernel, (gate, up), 1)[0]


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    return elementwise(_backward_kernel, (grad, gate, up), 2)


forward_op: Final = define(
    "swiglu_forward(Tensor gate, Tensor up) -> Tensor",
    _forward,
    fake=lambda gate, up: dense_like(gate),
    vmap=lambda info, dims, *xs: (forward_op(*mapped(info, dims, xs)), 0),
)
backward_op: Final = define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _backward,
    fake=lambda grad, gate, up: (dense_like(gate), dense_like(up)),
    vmap=lambda info, dims, *xs: (backward_op(*mapped(info, dims, xs)), (0, 0)),
)
_transposed: Final = pullback(backward_op)


class _SwiGLU(FirstOrder):
    """The two operators as a function and its transpose."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return forward_op(gate, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _transposed(grad, *ctx.saved_tensors)


def swiglu(gate: Tensor, up: Tensor, *, kernel: Kernel = "auto") -> Tensor:
    r"""SwiGLU: :math:`g \, \sigma(g) \, u`, elementwise.

    Args:
      gate: Any shape, floating; computed in float32 (float64 for float64).
      up: Like ``gate``: its shape, dtype and device.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      A tensor like ``gate``, rounded once.

    Raises:
      TypeError: An argument that is not a floating tensor, or two dtypes.
      ValueError: Two shapes or devices; a ``kernel`` that is not there.
      RuntimeError: A second derivative of the Triton kernel.

    Laws:
      ``kernel="triton"`` is ``kernel="reference"`` within 4 roundings of the dtype.

    Examples:
      >>> swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
      tensor([0.0000, 1.4621])

    References:
      Shazeer, `GLU Variants Improve Transformer
      <https://arxiv.org/abs/2002.05202>`_, 2020.
    """
    check_gated("swiglu", gate, up)
    if not runs_triton("swiglu", kernel, gate, up):
        return swiglu_reference(gate, up)
    return _SwiGLU.apply(gate, up)


CONFIGURATIONS: Final = (
    *configurations(
        "swiglu/forward", _forward_kernel, ("gate_ptr", "up_ptr", "out_ptr"), {}
    ),
    *configurations(
        "swiglu/backward",
        _backward_kernel,
        ("grad_ptr", "gate_ptr", "up_ptr", "gate_grad_ptr", "up_grad_ptr"),
        {},
    ),
)
