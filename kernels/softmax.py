# SPDX-License-Identifier: Apache-2.0
r"""Softmax over the last dim, with scale, mask and causality in the kernel.

.. math::
  y_j = \frac{\exp(z_j - \max z)}{\sum_k \exp(z_k - \max z)}, \quad z = s x + m, \qquad
  \bar x_j = s \, y_j \Bigl(\bar y_j - \sum_k \bar y_k y_k\Bigr)

Bytes per element, in elements of the dtype: forward 1 read and 1 written (4 B in
bfloat16), backward 2 read and 1 written (6 B). A row wider than ``ONE_PASS`` is read
twice. A mask adds what it holds, read through its strides; a causal row reads only the
columns that it sees. The backward needs the output and neither input nor mask.
"""

import math
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration, pointer
from .library import (
    FirstOrder,
    Kernel,
    batched_first,
    check_columns,
    check_floating,
    check_number,
    compute_dtype,
    define,
    pullback,
    runs_triton,
)
from .softmax_kernels import (
    backward_kernel,
    forward_kernel,
    loop_backward_kernel,
    loop_forward_kernel,
)

ONE_PASS: Final = 32768
TWO_TENSORS: Final = 16384
LOOP_BLOCK: Final = 4096
TILE: Final = 2048


def softmax_reference(
    x: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """``softmax(scale * x + mask)`` in float32 at least; fully masked rows are 0.

    Args:
      x: At least one dim.
      scale: Of ``x``, not of the mask.
      mask: Boolean (True takes part) or additive, broadcastable to ``x``.
      causal: Row i of [T, S] sees the columns up to ``i + S - T``.
    """
    if mask is None and not causal and scale == 1.0:
        return torch.softmax(x, -1)
    scores = x.to(compute_dtype(x.dtype)) * scale
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    if causal:
        T, S = x.shape[-2:]
        seen = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        scores = scores.masked_fill(~seen, -math.inf)
    if (mask is None and not causal) or x.numel() == 0:
        return torch.softmax(scores, -1).to(x.dtype)
    nothing = scores.detach().amax(-1, keepdim=True) == -math.inf
    y = torch.softmax(scores.masked_fill(nothing, 0.0), -1)
    return y.masked_fill(nothing, 0.0).to(x.dtype)


def _tile(cols: int) -> tuple[int, int, int]:
    """(rows of a program, columns of a program, warps)."""
    block = triton.next_power_of_2(cols)
    return max(1, TILE // block), block, min(32, max(4, block // 512))


def _mask_strides(mask: Tensor | None, x: Tensor) -> tuple[Any, ...]:
    """How a mask lies over rows [size_0, size_1, size_2] of ``x``, and its kind."""
    if mask is None:
        return x, 1, 1, 0, 0, 0, 1, "none"
    kind = "boolean" if mask.dtype == torch.bool else "additive"
    mask = mask.expand(x.shape)
    groups: list[list[int]] = []
    for size, step in zip(x.shape[:-1], mask.stride()[:-1], strict=True):
        if groups and groups[-1][1] == size * step:
            groups[-1] = [groups[-1][0] * size, step]
        elif size > 1:
            groups.append([size, step])
    if len(groups) > 3:
        return _mask_strides(mask.contiguous(), x)
    sizes, steps = zip(*[[1, 0]] * (3 - len(groups)), *groups, strict=True)
    return mask, *sizes[1:], *steps, mask.stride(-1), kind


def _settings(x: Tensor, scale: float, causal: bool, widest: int) -> tuple[Any, ...]:
    """Grid, arguments between pointers and mask, constants; None where it loops."""
    cols, exact = x.shape[-1], x.dtype == torch.float64
    rows, length = x.numel() // cols, x.shape[-2] if causal else 1
    constants = {
        "SCALE": scale if exact else None,
        "CAUSAL": causal,
        "WIDE": tl.float64 if exact else tl.float32,
    }
    if cols > widest:
        shape = {"BLOCK": LOOP_BLOCK, "num_warps": 8}
        return (rows,), (cols, length, scale), constants | shape
    ROWS, block, warps = _tile(cols)
    shape = {"ROWS": ROWS, "BLOCK": block, "num_warps": warps}
    grid = (triton.cdiv(rows, ROWS),)
    return grid, (rows, cols, length, scale), constants | shape


def _forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    mask, *lies, kind = _mask_strides(mask, x)
    grid, middle, constants = _settings(x, scale, causal, _widest(kind))
    kernel = forward_kernel if "ROWS" in constants else loop_forward_kernel
    kernel[grid](x, mask, out, *middle, *lies, MASK=kind, **constants)
    return out


def _backward(
    grad: Tensor, out: Tensor, scale: float, causal: bool, wide: bool
) -> Tensor:
    grad, out = grad.contiguous(), out.contiguous()
    x_grad = _backward_like(grad, out, scale, causal, wide)
    if out.numel() == 0:
        return x_grad
    grid, middle, constants = _settings(out, scale, causal, TWO_TENSORS)
    kernel = backward_kernel if "ROWS" in constants else loop_backward_kernel
    kernel[grid](grad, out, x_grad, *middle, **constants)
    return x_grad


def _widest(mask: str) -> int:
    return TWO_TENSORS if mask == "additive" else ONE_PASS


def _backward_like(
    grad: Tensor, out: Tensor, scale: float, causal: bool, wide: bool
) -> Tensor:
    dtype = compute_dtype(out.dtype) if wide else out.dtype
    return out.new_empty(out.shape, dtype=dtype)


def _forward_mapped(info: Any, dims: Any, x: Tensor, mask: Any, *rest: Any) -> Any:
    x = batched_first(x, dims[0], info.batch_size)
    if dims[1] is not None:
        mask = mask.movedim(dims[1], 0)
        mask = mask[(slice(None), *(None,) * (x.ndim - mask.ndim))]
    return forward_op(x, mask, *rest), 0


def _backward_mapped(info: Any, dims: Any, *args: Any) -> Any:
    pairs = zip(args, dims, strict=True)
    return backward_op(*[batched_first(x, d, info.batch_size) for x, d in pairs]), 0


forward_op: Final = define(
    "softmax_forward(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor",
    _forward,
    fake=lambda x, mask, scale, causal: x.new_empty(x.shape),
    vmap=_forward_mapped,
)
backward_op: Final = define(
    "softmax_backward(Tensor grad, Tensor out, float scale, bool causal, bool wide)"
    " -> Tensor",
    _backward,
    fake=_backward_like,
    vmap=_backward_mapped,
)
_transposed: Final = pullback(backward_op)


class _Softmax(FirstOrder):
    """The two operators; a mask that is added gets its gradient summed in float32."""

    @staticmethod
    def forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        return forward_op(x, mask, scale, causal)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _x, mask, ctx.scale, ctx.causal = inputs
        ctx.mask = None if mask is None else (mask.shape, mask.dtype)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (out,) = ctx.saved_tensors
        x_grad = mask_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _transposed(grad, out, ctx.scale, ctx.causal, False)
        if ctx.needs_input_grad[1]:
            full = _transposed(grad, out, 1.0, ctx.causal, True)
            shape, dtype = ctx.mask
            mask_grad = full.sum_to_size(shape).to(dtype)
        return x_grad, mask_grad, None, None


def softmax(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    causal: bool = False,
    kernel: Kernel = "auto",
) -> Tensor:
    r"""Softmax of ``scale * x + mask`` over the last dim.

    A row of which a mask or causality leaves nothing is zero, and so is its gradient.

    Args:
      x: At least one dim, floating; computed in float32 (float64 for float64).
      scale: A number, applied before the mask. (It is a constant of the compiled
        kernel for float64 only.)
      mask: Broadcastable to ``x`` and read through its strides, never expanded.
        Boolean: True takes part. Floating: added, and differentiable.
      causal: Row i of the last two dims [T, S] sees the columns up to ``i + S - T``.
        What a row does not see is not read.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      A tensor like ``x``, rounded once.

    Raises:
      TypeError: ``x`` is no floating tensor; a mask neither boolean nor floating.
      ValueError: A mask that does not broadcast to ``x``; causality in one dim; no dim;
        two devices; a ``kernel`` that is not there.
      RuntimeError: A second derivative of the Triton kernel.

    Laws:
      ``kernel="triton"`` is ``kernel="reference"`` within 16 roundings of float32 and
      one of the dtype. A mask ``ones(T, S).tril(S - T).bool()`` is ``causal=True``.

    Examples:
      >>> softmax(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), causal=True)
      tensor([[1.0000, 0.0000],
              [0.5000, 0.5000]])

    References:
      Milakov and Gimelshein, `Online normalizer calculation for softmax
      <https://arxiv.org/abs/1805.02867>`_, 2018 (rows beyond ``ONE_PASS``).

    Differs from:
      ``torch.softmax``, where a row that a mask of -inf covers is NaN. (A row of -inf
      without a mask is NaN here too.)
    """
    check_floating("softmax", x=x)
    if x.ndim == 0:
        raise ValueError("softmax: x has no dim, expected at least one; use x[None]")
    check_number("softmax", "scale", scale)
    check_columns("softmax", "x", x)
    if causal and x.ndim == 1:
        raise ValueError(
            f"softmax: causal=True and x of shape {tuple(x.shape)}, expected at least "
            "two dims [T, S]; use x[None]"
        )
    if mask is not None:
        _check_mask(x, mask)
    if not runs_triton("softmax", kernel, x, mask):
        return softmax_reference(x, scale=scale, mask=mask, causal=causal)
    return _Softmax.apply(x, mask, float(scale), causal)


def _check_mask(x: Tensor, mask: Tensor) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"softmax: mask is {type(mask).__name__}, expected a tensor or None"
        )
    if mask.dtype != torch.bool:
        check_floating("softmax", mask=mask)
    pairs = zip(mask.shape[::-1], x.shape[::-1], strict=False)
    if mask.ndim > x.ndim or any(m not in (1, n) for m, n in pairs):
        raise ValueError(
            f"softmax: mask has shape {tuple(mask.shape)}, expected one that "
            f"broadcasts to {tuple(x.shape)}"
        )


def _configuration(
    kind: str, dtype: torch.dtype, cols: int, mask: str = "none", causal: bool = False
) -> Configuration:
    forward = kind == "forward"
    x = pointer(dtype)
    tiled = cols <= (_widest(mask) if forward else TWO_TENSORS)
    if forward:
        kernel = forward_kernel if tiled else loop_forward_kernel
        pointers = {"x_ptr": x, "mask_ptr": x, "out_ptr": x}
        pointers["mask_ptr"] = pointer(torch.bool) if mask == "boolean" else x
        lies = "size_1", "size_2", "step_0", "step_1", "step_2"
    else:
        kernel = backward_kernel if tiled else loop_backward_kernel
        pointers = dict.fromkeys(("grad_ptr", "out_ptr", "x_grad_ptr"), x)
        lies = ()
    constants: dict[str, Any] = {"SCALE": None, "CAUSAL": causal, "WIDE": tl.float32}
    integers = ("cols", "length", *lies)
    warps = 8
    if tiled:
        constants["ROWS"], constants["BLOCK"], warps = _tile(cols)
        integers = ("rows", *integers)
    else:
        constants["BLOCK"] = LOOP_BLOCK
    if forward:
        constants |= {"MASK": mask, "step": 1}
    variant = "".join(
        f"/{x}" for x in (mask, "causal" * causal) if x not in ("", "none")
    )
    return Configuration(
        f"softmax/{kind}/{x[1:]}/{cols}{variant}",
        kernel,
        pointers | dict.fromkeys(integers, "i32") | {"scale": "fp32"},
        constants,
        warps,
        divisible=integers,
    )


_WIDTHS: Final = 1024, 2048, 4096, 8192, 16384, 32768, 131072
CONFIGURATIONS: Final = (
    *(
        _configuration(kind, dtype, cols)
        for kind in ("forward", "backward")
        for dtype in (torch.bfloat16, torch.float32)
        for cols in _WIDTHS
    ),
    *(
        _configuration("forward", torch.bfloat16, cols, mask, causal)
        for cols in (1024, 4096, 32768, 131072)
        for mask, causal in (("none", True), ("boolean", False), ("additive", True))
    ),
    *(
        _configuration("backward", torch.bfloat16, cols, causal=True)
        for cols in (1024, 4096, 131072)
    ),
)
