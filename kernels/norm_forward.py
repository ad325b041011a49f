# SPDX-License-Identifier: Apache-2.0
r"""The forward kernels of RMSNorm and LayerNorm.

With :math:`c = x - \mathrm{mean}(x)` (LayerNorm) or :math:`c = x` (RMSNorm):

.. math:: y = r \, c \, s + b, \quad r = (\mathrm{mean}(c^2) + \epsilon)^{-1/2}

What is not there is None: scale, bias, residual, and the mean of an RMSNorm.
"""

import triton
import triton.language as tl


@triton.jit
def stream(ptr, at, inside, WIDE: tl.constexpr):
    """Elements in the dtype of the arithmetic, and zeros outside."""
    return tl.load(ptr + at, inside, 0.0).to(WIDE)


@triton.jit
def _once(ptr, at, inside, WIDE: tl.constexpr):
    """Elements that nobody reads again: the cache drops them first."""
    return tl.load(ptr + at, inside, 0.0, eviction_policy="evict_first").to(WIDE)


@triton.jit
def parameter(ptr, column, present, WIDE: tl.constexpr):
    """Columns of scale or bias, which every row reads again: the cache keeps them."""
    return tl.load(ptr + column, present, 0.0, eviction_policy="evict_last").to(WIDE)


@triton.jit(do_not_specialize=["rows"])
def forward_rows(
    x_ptr,
    residual_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    columns,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS whole rows per program, in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    present = column < columns
    inside = (row < rows) & present
    at = row * columns + column
    x = _once(x_ptr, at, inside, WIDE)
    if residual_ptr is not None:
        residual = _once(residual_ptr, at, inside, WIDE)
        total = (x + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, inside)
        x = total.to(WIDE)
    if mean_ptr is not None:
        mean = tl.sum(x, 1, keep_dims=True) / columns
        tl.store(mean_ptr + row, mean, row < rows)
        x = tl.where(present, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / columns + EPS)
    tl.store(rstd_ptr + row, rstd, row < rows)
    y = x * rstd
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + column, present, 0.0, eviction_policy="evict_last").to(
            WIDE
        )
    if bias_ptr is not None:
        y += parameter(bias_ptr, column, present, WIDE)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def forward_chunks(
    x_ptr,
    residual_ptr,
    scale_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    columns,
    EPS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program, in chunks: its statistics, then the row again."""
    row = tl.program_id(0).to(tl.int64)
    start = row * columns
    mean = tl.sum(tl.zeros((BLOCK,), WIDE), 0)
    squares = mean
    done = 0
    while done < columns:
        column = done + tl.arange(0, BLOCK)
        inside = column < columns
        x = stream(x_ptr + start, column, inside, WIDE)
        if residual_ptr is not None:
            x += stream(residual_ptr + start, column, inside, WIDE)
            total = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + start + column, total, inside)
            x = total.to(WIDE)
        if mean_ptr is not None:
            # Chan's update: the squares around the mean of the chunk, then its shift.
            count = tl.minimum(columns - done, BLOCK).to(WIDE)
            here = tl.sum(x, 0) / count
            x = tl.where(inside, x - here, 0.0)
            shift = here - mean
            mean += shift * (count / (done + count))
            squares += shift * shift * (count * (done / (done + count)))
        squares += tl.sum(x * x, 0)
        done += BLOCK
    rstd = tl.rsqrt(squares / columns + EPS)
    tl.store(rstd_ptr + row, rstd)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
    done = 0
    while done < columns:
        column = done + tl.arange(0, BLOCK)
        inside = column < columns
        if residual_ptr is not None:
            y = stream(total_ptr + start, column, inside, WIDE)
        else:
            y = stream(x_ptr + start, column, inside, WIDE)
        if mean_ptr is not None:
            y -= mean
        y *= rstd
        if scale_ptr is not None:
            y *= parameter(scale_ptr, column, inside, WIDE)
        if bias_ptr is not None:
            y += parameter(bias_ptr, column, inside, WIDE)
        tl.store(y_ptr + start + column, y.to(y_ptr.dtype.element_ty), inside)
        done += BLOCK
