# SPDX-License-Identifier: Apache-2.0
r"""GEGLU: a gated unit with GELU at its gate, elementwise.

.. math::
  y = g \, \Phi(g) \, u, \qquad
  \bar g = \bar y \, u \, (\Phi(g) + g \, \varphi(g)), \qquad
  \bar u = \bar y \, g \, \Phi(g)

with the normal distribution :math:`\Phi` and density :math:`\varphi`, or with the
sigmoid of :math:`2 \sqrt{2 / \pi} \, (g + 0.044715 g^3)` in the place of :math:`\Phi`.

Bytes per element, in elements of the dtype: forward 2 read and 1 written (6 B in
bfloat16), backward 3 read and 2 written (10 B).
"""

from typing import Any, Final, Literal, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import gelu
from .gated import check_gated, configurations, dense_like, elementwise, mapped
from .library import FirstOrder, Kernel, compute_dtype, define, pullback, runs_triton

Approximate = Literal["none", "tanh"]


def geglu_reference(
    gate: Tensor, up: Tensor, *, approximate: Approximate = "none"
) -> Tensor:
    """``gelu(gate) * up`` in float32 at least, rounded once.

    Args:
      gate: Any shape and floating dtype.
      up: Like ``gate``.
      approximate: "none", or "tanh".
    """
    wide = compute_dtype(gate.dtype)
    opened = torch.nn.functional.gelu(gate.to(wide), approximate=approximate)
    return (opened * up.to(wide)).to(gate.dtype)


@triton.jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    numel,
    TANH: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    gate = tl.load(gate_ptr + at, inside, 0.0).to(WIDE)
    up = tl.load(up_ptr + at, inside, 0.0).to(WIDE)
    out = gelu(gate, TANH)[0] * up
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _backward_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    gate_grad_ptr,
    up_grad_ptr,
    numel,
    TANH: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    grad = tl.load(grad_ptr + at, inside, 0.0).to(WIDE)
    gate = tl.load(gate_ptr + at, inside, 0.0).to(WIDE)
    up = tl.load(up_ptr + at, inside, 0.0).to(WIDE)
    opened, slope = gelu(gate, TANH)
    gate_grad = grad * up * slope
    up_grad = grad * opened
    tl.store(gate_grad_ptr + at, gate_grad.to(gate_grad_ptr.dtype.element_ty), inside)
    tl.store(up_grad_ptr + at, up_grad.to(up_grad_ptr.dtype.element_ty), inside)


def _forward(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
    return elementwise(_forward_kernel, (gate, up), 1, TANH=tanh)[0]


def _backward(grad: Tensor, gate: Tensor, up: Tensor, tanh: bool) -> tuple[Tensor, ...]:
    return elementwise(_backward_kernel, (grad, gate, up), 2, TANH=tanh)


forward_op: Final = define(
    "geglu_forward(Tensor gate, Tensor up, bool tanh) -> Tensor",
    _forward,
    fake=lambda gate, up, tanh: dense_like(gate),
    vmap=lambda info, dims, *xs: (forward_op(*mapped(info, dims, xs)), 0),
)
backward_op: Final = define(
    "geglu_backward(Tensor grad, Tensor gate, Tensor up, bool tanh)"
    " -> (Tensor, Tensor)",
    _backward,
    fake=lambda grad, gate, up, tanh: (dense_like(gate), dense_like(up)),
    vmap=lambda info, dims, *xs: (backward_op(*mapped(info, dims, xs)), (0, 0)),
)
_transposed: Final = pullback(backward_op)


class _GEGLU(FirstOrder):
    """The two operators as a function and its transpose."""

    @staticmethod
    def forward(gate: Tensor, up: Tensor, tanh: bool) -> Tensor:
        return forward_op(gate, up, tanh)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gate, up, ctx.tanh = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *_transposed(grad, *ctx.saved_tensors, ctx.tanh), None


def is_tanh(name: str, approximate: Approximate) -> bool:
    """Whether it is the tanh form.

    Raises:
      ValueError: Neither "none" nor "tanh".
    """
    if approximate not in get_args(Approximate):
        raise ValueError(
            f"{name}: approximate is {approximate!r}, expected 'none' or 'tanh'; type "
            'approximate="none"'
        )
    return approximate == "tanh"


def geglu(
    gate: Tensor,
    up: Tensor,
    *,
    approximate: Approximate = "none",
    kernel: Kernel = "auto",
) -> Tensor:
    r"""GEGLU: :math:`g \, \Phi(g) \, u`, elementwise.

    Args:
      gate: Any shape, floating; computed in float32 (float64 for float64).
      up: Like ``gate``: its shape, dtype and device.
      approximate: "none" is the normal distribution function by the error function,
        "tanh" its approximation by a tanh, of Gemma and GPT-2.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      A tensor like ``gate``, rounded once; contiguous from Triton.

    Raises:
      TypeError: An argument that is not a floating tensor, or two dtypes.
      ValueError: Two shapes or devices; an ``approximate`` or ``kernel`` that is not
        there.
      RuntimeError: A second derivative of the Triton kernel.

    Laws:
      The Triton kernel is the formula within :math:`16 \epsilon |u| \max(1, |g|)` and
      one rounding to the dtype, where :math:`\epsilon` is that of float32 (of float64
      for float64).

    Examples:
      >>> geglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
      tensor([0.0000, 1.6827])

    References:
      Shazeer, `GLU Variants Improve Transformer
      <https://arxiv.org/abs/2002.05202>`_, 2020.

    Differs from:
      ``torch.nn.functional.gelu`` is NaN at a gate of minus infinity; the Triton
      kernel gives the limit, a shut gate, in the value and in both gradients.
    """
    check_gated("geglu", gate, up)
    tanh = is_tanh("geglu", approximate)
    if not runs_triton("geglu", kernel, gate, up):
        return geglu_reference(gate, up, approximate=approximate)
    return _GEGLU.apply(gate, up, tanh)


_POINTERS: Final = (
    ("forward", _forward_kernel, ("gate_ptr", "up_ptr", "out_ptr")),
    (
        "backward",
        _backward_kernel,
        ("grad_ptr", "gate_ptr", "up_ptr", "gate_grad_ptr", "up_grad_ptr"),
    ),
)
CONFIGURATIONS: Final = tuple(
    one
    for form, tanh in (("erf", False), ("tanh", True))
    for kind, kernel, pointers in _POINTERS
    for one in configurations(f"geglu/{kind}/{form}", kernel, pointers, {"TANH": tanh})
)
