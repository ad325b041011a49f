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

from .configuration import Configuration, pointer
from .library import (
    Kernel,
    batched_first,
    check_floating,
    check_shape,
    compute_dtype,
    define,
    pullback,
    runs_triton,
)

BLOCK: Final = 1024
NUM_WARPS: Final = 4


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
    out = gate / (1.0 + tl.exp(-gate)) * up
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
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    gate_grad = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    up_grad = grad * gate * sigmoid
    tl.store(gate_grad_ptr + at, gate_grad.to(gate_grad_ptr.dtype.element_ty), inside)
    tl.store(up_grad_ptr + at, up_grad.to(up_grad_ptr.dtype.element_ty), inside)


def _launch(kernel: Any, *tensors: Tensor) -> None:
    numel = tensors[0].numel()
    if numel == 0:
        return
    wide = tl.float64 if tensors[0].dtype == torch.float64 else tl.float32
    grid = (triton.cdiv(numel, BLOCK),)
    kernel[grid](*tensors, numel, WIDE=wide, BLOCK=BLOCK, num_warps=NUM_WARPS)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    _launch(_forward_kernel, gate, up, out)
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    gate_grad, up_grad = torch.empty_like(gate), torch.empty_like(up)
    _launch(_backward_kernel, grad, gate, up, gate_grad, up_grad)
    return gate_grad, up_grad


def _mapped(info: Any, in_dims: Any, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [
        batched_first(x, dim, info.batch_size)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]


def _dense_like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


forward_op: Final = define(
    "swiglu_forward(Tensor gate, Tensor up) -> Tensor",
    _forward,
    fake=lambda gate, up: _dense_like(gate),
    vmap=lambda info, dims, *xs: (forward_op(*_mapped(info, dims, xs)), 0),
)
backward_op: Final = define(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _backward,
    fake=lambda grad, gate, up: (_dense_like(gate), _dense_like(up)),
    vmap=lambda info, dims, *xs: (backward_op(*_mapped(info, dims, xs)), (0, 0)),
)
_transposed: Final = pullback(backward_op)


class _SwiGLU(torch.autograd.Function):
    """The two operators as a function and its transpose."""

    generate_vmap_rule = True

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
    check_floating("swiglu", gate=gate, up=up)
    check_shape("swiglu", "up", up, tuple(gate.shape))
    if gate.dtype != up.dtype:
        raise TypeError(
            f"swiglu: up is {up.dtype}, expected {gate.dtype} as gate; use "
            "up.to(gate.dtype)"
        )
    if not runs_triton("swiglu", kernel, gate, up):
        return swiglu_reference(gate, up)
    return _SwiGLU.apply(gate, up)


def _configurations(dtype: torch.dtype) -> tuple[Configuration, ...]:
    x, constants = pointer(dtype), {"WIDE": tl.float32, "BLOCK": BLOCK}
    names = "gate_ptr", "up_ptr", "out_ptr"
    grads = "grad_ptr", "gate_ptr", "up_ptr", "gate_grad_ptr", "up_grad_ptr"
    return tuple(
        Configuration(
            f"swiglu/{kind}/{x[1:]}",
            kernel,
            dict.fromkeys(pointers, x) | {"numel": "i64"},
            constants,
            NUM_WARPS,
            divisible=("numel",),
        )
        for kind, kernel, pointers in (
            ("forward", _forward_kernel, names),
            ("backward", _backward_kernel, grads),
        )
    )


CONFIGURATIONS: Final = (
    *_configurations(torch.bfloat16),
    *_configurations(torch.float32),
)
