# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of softmax: a tile of whole rows, or one wide row in blocks."""

import triton
import triton.language as tl


@triton.jit
def _seen(row, cols, length, CAUSAL: tl.constexpr):
    if CAUSAL:
        return tl.minimum(tl.maximum(row % length + (cols - length) + 1, 0), cols)
    return row * 0 + cols


@triton.jit
def _read(seen, cols, CAUSAL: tl.constexpr):
    # Whole vectors of 16 elements: loads stay wide, what is not seen is dropped after.
    if CAUSAL:
        return tl.minimum((seen + 15) // 16 * 16, cols)
    return seen


@triton.jit
def _scaled(x, scale, SCALE: tl.constexpr):
    return x * (scale if SCALE is None else SCALE)


@triton.jit
def _scores(
    at,
    mask_at,
    load,
    keep,
    scale,
    SCALE: tl.constexpr,
    MASK: tl.constexpr,
    WIDE: tl.constexpr,
):
    x = _scaled(tl.load(at, load, 0.0).to(WIDE), scale, SCALE)
    if MASK == "additive":
        x = x + tl.load(mask_at, load, 0.0).to(WIDE)
    if MASK == "boolean":
        keep = keep & (tl.load(mask_at, load, 0) != 0)
    return tl.where(keep, x, -float("inf"))


@triton.jit
def _mask_row(row, size_1, size_2, step_0, step_1, step_2):
    outer = row // size_2
    return (
        (row % size_2) * step_2 + (outer % size_1) * step_1 + (outer // size_1) * step_0
    )


@triton.jit
def _finite(top):
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _divisor(total, MASK: tl.constexpr, CAUSAL: tl.constexpr):
    # A row of -inf is 0 where it is masked, and NaN, as in torch, where it is not.
    if MASK != "none" or CAUSAL:
        total = tl.where(total == 0.0, 1.0, total)
    else:
        total = tl.where(total == 0.0, float("nan"), total)
    return total


@triton.jit
def forward_kernel(
    x_ptr,
    mask_ptr,
    out_ptr,
    rows,
    cols,
    length,
    scale,
    size_1,
    size_2,
    step_0,
    step_1,
    step_2,
    step,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of rows, each read once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    here = row < rows
    seen = _seen(row, cols, length, CAUSAL)
    load = here & (column < _read(seen, cols, CAUSAL))
    keep = here & (column < seen)
    mask_at = mask_ptr + _mask_row(row, size_1, size_2, step_0, step_1, step_2)
    mask_at += column.to(tl.int64) * step
    at = row * cols + column
    x = _scores(x_ptr + at, mask_at, load, keep, scale, SCALE, MASK, WIDE)
    x = tl.exp(x - _finite(tl.max(x, 1))[:, None])
    total = tl.sum(x, 1)
    total = _divisor(total, MASK, CAUSAL)
    y = x / total[:, None]
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), here & (column < cols))


@triton.jit
def loop_forward_kernel(
    x_ptr,
    mask_ptr,
    out_ptr,
    cols,
    length,
    scale,
    size_1,
    size_2,
    step_0,
    step_1,
    step_2,
    step,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, read twice: once for its maximum and sum, once to write it."""
    row = tl.program_id(0).to(tl.int64)
    seen = _seen(row, cols, length, CAUSAL)
    read = _read(seen, cols, CAUSAL)
    x_ptr += row * cols
    out_ptr += row * cols
    mask_ptr += _mask_row(row, size_1, size_2, step_0, step_1, step_2)
    top = tl.full((), -float("inf"), WIDE)
    total = tl.full((), 0.0, WIDE)
    start = 0
    while start < seen:
        column = start + tl.arange(0, BLOCK)
        x = _scores(
            x_ptr + column,
            mask_ptr + column.to(tl.int64) * step,
            column < read,
            column < seen,
            scale,
            SCALE,
            MASK,
            WIDE,
        )
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - _finite(higher))
        total += tl.sum(tl.exp(x - _finite(higher)), 0)
        top = higher
        start += BLOCK
    total = _divisor(total, MASK, CAUSAL)
    start = (cols - 1) // BLOCK * BLOCK
    while start >= 0:
        column = start + tl.arange(0, BLOCK)
        x = _scores(
            x_ptr + column,
            mask_ptr + column.to(tl.int64) * step,
            column < read,
            column < seen,
            scale,
            SCALE,
            MASK,
            WIDE,
        )
        y = tl.exp(x - _finite(top)) / total
        tl.store(out_ptr + column, y.to(out_ptr.dtype.element_ty), column < cols)
        start -= BLOCK


@triton.jit
def backward_kernel(
    grad_ptr,
    out_ptr,
    x_grad_ptr,
    rows,
    cols,
    length,
    scale,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of rows, gradient and output read once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    here = row < rows
    seen = _seen(row, cols, length, CAUSAL)
    load = here & (column < _read(seen, cols, CAUSAL))
    at = row * cols + column
    y = tl.load(out_ptr + at, load, 0.0).to(WIDE)
    grad = tl.load(grad_ptr + at, load, 0.0).to(WIDE)
    grad = tl.where(column < seen, grad, 0.0)
    x_grad = _scaled(y * (grad - tl.sum(y * grad, 1)[:, None]), scale, SCALE)
    x_grad = x_grad.to(x_grad_ptr.dtype.element_ty)
    tl.store(x_grad_ptr + at, x_grad, here & (column < cols))


@triton.jit
def loop_backward_kernel(
    grad_ptr,
    out_ptr,
    x_grad_ptr,
    cols,
    length,
    scale,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, gradient and output read twice."""
    row = tl.program_id(0).to(tl.int64)
    seen = _seen(row, cols, length, CAUSAL)
    read = _read(seen, cols, CAUSAL)
    grad_ptr += row * cols
    out_ptr += row * cols
    x_grad_ptr += row * cols
    total = tl.full((), 0.0, WIDE)
    start = 0
    while start < seen:
        column = start + tl.arange(0, BLOCK)
        y = tl.load(out_ptr + column, column < read, 0.0).to(WIDE)
        grad = tl.load(grad_ptr + column, column < read, 0.0).to(WIDE)
        grad = tl.where(column < seen, grad, 0.0)
        total += tl.sum(y * grad, 0)
        start += BLOCK
    start = (cols - 1) // BLOCK * BLOCK
    while start >= 0:
        column = start + tl.arange(0, BLOCK)
        y = tl.load(out_ptr + column, column < read, 0.0).to(WIDE)
        grad = tl.load(grad_ptr + column, column < read, 0.0).to(WIDE)
        grad = tl.where(column < seen, grad, 0.0)
        x_grad = _scaled(y * (grad - total), scale, SCALE)
        x_grad = x_grad.to(x_grad_ptr.dtype.element_ty)
        tl.store(x_grad_ptr + column, x_grad, column < cols)
        start -= BLOCK
