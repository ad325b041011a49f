# SPDX-License-Identifier: Apache-2.0
r"""Rotary positions: each pair of coordinates (i, i + K/2) turned by its angle.

.. math::
  y_i = x_i c_i - x_{i+K/2} s_i, \qquad y_{i+K/2} = x_{i+K/2} c_i + x_i s_i

The map is linear, and its transpose turns the other way: the same kernel with ``-s``.

Bytes per element, in elements of the dtype: 1 read and 1 written (4 B in bfloat16),
forward and backward. The tables are read once per position from memory; heads that are
neighbours in memory find them in the cache.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration, pointer
from .library import (
    FirstOrder,
    Kernel,
    batched_first,
    check_floating,
    define,
    runs_triton,
)

BLOCK: Final = 1024  # pairs of a program
COLUMNS: Final = 128  # of them in one row, at most
NUM_WARPS: Final = 4
ROW_DIMS: Final = 4  # dims before the last that the kernel steps through


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula in the dtype of the tables, rounded once.

    Args:
      x: ``[..., T, K]``.
      cos: ``[T, R]``, or any shape that broadcasts to ``[..., T, R]``; 2 R <= K.
      sin: Like ``cos``.
    """
    width = 2 * cos.shape[-1]
    turning = x if width == x.shape[-1] else x[..., :width]
    a, b = turning.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
    if width == x.shape[-1]:
        return turned
    return torch.cat([turned, x[..., width:]], dim=-1)


@triton.jit
def _kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    rows,
    size_1,
    size_2,
    size_3,
    x_0,
    x_1,
    x_2,
    x_3,
    table_0,
    table_1,
    table_2,
    table_3,
    out_0,
    out_1,
    out_2,
    out_3,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """ROWS rows, and of each COLS pairs (and COLS coordinates that stay).

    INDEX is the integer that counts rows: int32 where it can, for division is slow in
    int64. Offsets are int64.
    """
    blocks: tl.constexpr = (max(HALF, REST) + COLS - 1) // COLS
    program = tl.program_id(0).to(INDEX)
    row = program // blocks * ROWS + tl.arange(0, ROWS)
    col = program % blocks * COLS + tl.arange(0, COLS)[None, :]
    exists = (row < rows)[:, None]
    i_3 = (row % size_3).to(tl.int64)
    row = row // size_3
    i_2 = (row % size_2).to(tl.int64)
    row = row // size_2
    i_1 = (row % size_1).to(tl.int64)
    i_0 = (row // size_1).to(tl.int64)
    x_ptr += (i_0 * x_0 + i_1 * x_1 + i_2 * x_2 + i_3 * x_3)[:, None] + col
    out_ptr += (i_0 * out_0 + i_1 * out_1 + i_2 * out_2 + i_3 * out_3)[:, None] + col
    at = i_0 * table_0 + i_1 * table_1 + i_2 * table_2 + i_3 * table_3
    at = at[:, None] + col
    turns = exists & (col < HALF)
    cos = tl.load(cos_ptr + at, turns, 0.0).to(WIDE)
    sin = tl.load(sin_ptr + at, turns, 0.0).to(WIDE)
    a = tl.load(x_ptr, turns, 0.0).to(WIDE)
    b = tl.load(x_ptr + HALF, turns, 0.0).to(WIDE)
    if INVERSE:
        sin = -sin
    out = a * cos - b * sin
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), turns)
    out = b * cos + a * sin
    tl.store(out_ptr + HALF, out.to(out_ptr.dtype.element_ty), turns)
    if REST > 0:
        stays = exists & (col < REST)
        tl.store(out_ptr + 2 * HALF, tl.load(x_ptr + 2 * HALF, stays, 0.0), stays)


class _Tile(NamedTuple):
    """What a program takes of a tensor with so many pairs and coordinates that stay."""

    rows: int
    columns: int

    @classmethod
    def of(cls, half: int, rest: int) -> "_Tile":
        columns = min(triton.next_power_of_2(max(half, rest)), COLUMNS)
        return cls(BLOCK // columns, columns)


def _forward(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    out = _like(x)
    if x.numel() == 0:
        return out
    half = cos.shape[-1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = torch.broadcast_tensors(cos, sin)
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    tables = [t.expand(*x.shape[:-1], half) for t in (cos, sin)]
    steps = _steps(x, tables[0], out)
    if len(steps) > ROW_DIMS:
        dense = [t.contiguous() for t in (x, *tables)]
        return out.copy_(_forward(*dense, inverse))
    steps = [(1, 0, 0, 0)] * (ROW_DIMS - len(steps)) + steps
    sizes, *strides = zip(*steps, strict=True)
    rest = x.shape[-1] - 2 * half
    tile, rows = _Tile.of(half, rest), x.numel() // x.shape[-1]
    blocks = triton.cdiv(max(half, rest), tile.columns)
    programs = triton.cdiv(rows, tile.rows) * blocks
    _kernel[(programs,)](
        x,
        *tables,
        out,
        rows,
        *sizes[1:],
        *(stride for one in strides for stride in one),
        HALF=half,
        REST=rest,
        INVERSE=inverse,
        WIDE=tl.float64 if cos.dtype == torch.float64 else tl.float32,
        INDEX=tl.int32 if programs * tile.rows < 2**31 else tl.int64,
        ROWS=tile.rows,
        COLS=tile.columns,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )
    return out


def _like(x: Tensor) -> Tensor:
    """An empty dense tensor whose dims lie in memory as those of ``x``, the last last.

    Queries come as ``[B, H, T, K]`` views of ``[B, T, H, K]``, and their gradients go
    back that way: results that lie the same way need no copy.
    """
    order = _order(x)
    dense = x.new_empty([x.shape[i] for i in order])
    return dense.permute([order.index(i) for i in range(x.dim())])


def _order(x: Tensor) -> list[int]:
    """Dims from the widest stride to the narrowest, the last dim last."""
    return [*sorted(range(x.dim() - 1), key=lambda i: -x.stride(i)), x.dim() - 1]


def _steps(x: Tensor, table: Tensor, out: Tensor) -> list[tuple[int, ...]]:
    """(size, strides of the three) of the dims before the last, merged where possible.

    They come in the order of ``out`` in memory.
    """
    steps: list[tuple[int, ...]] = []
    for i in _order(out)[:-1]:
        size, strides = x.shape[i], [t.stride(i) for t in (x, table, out)]
        if size == 1:
            continue
        if steps and list(steps[-1][1:]) == [size * stride for stride in strides]:
            size *= steps.pop()[0]
        steps.append((size, *strides))
    return steps


def _per_sample(info: Any, in_dims: Any, *args: Any) -> Any:
    """The rule for vmap: tables that are mapped are as long in dims as ``x`` is."""
    x, cos, sin, inverse = args
    x = batched_first(x, in_dims[0], info.batch_size)
    tables = [
        t if dim is None else _lengthened(t.movedim(dim, 0), x.dim())
        for t, dim in zip((cos, sin), in_dims[1:], strict=False)
    ]
    return rope_op(x, *tables, inverse), 0


def _lengthened(table: Tensor, dims: int) -> Tensor:
    missing = [1] * (dims - table.dim())
    return table.reshape(table.shape[0], *missing, *table.shape[1:])


rope_op: Final = define(
    "rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    _forward,
    fake=lambda x, cos, sin, inverse: _like(x),
    vmap=_per_sample,
)


class _Rope(FirstOrder):
    """The operator; its transpose is itself the other way round, at every order."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        return rope_op(x, cos, sin, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, cos, sin, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if any(ctx.needs_input_grad[1:3]):
            raise RuntimeError(
                "rope: the kernel has no gradient for cos and sin; use cos.detach() "
                'and sin.detach(), or pass kernel="reference"'
            )
        return _transposed(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None


_transposed: Final = _Rope.apply


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, kernel: Kernel = "auto") -> Tensor:
    r"""Turn each pair of coordinates ``(i, i + R)`` of the first 2 R by its angle.

    Args:
      x: Queries or keys ``[..., T, K]``, floating, with any strides: a transposed view
        is read where it lies.
      cos: Cosines ``[T, R]``, or a shape that broadcasts to ``[..., T, R]``, in float32
        or float64, the dtype of the arithmetic. R is K / 2, or less: then the
        coordinates from 2 R on stay as they are.
      sin: Sines, like ``cos``.
      kernel: "auto" is Triton on CUDA and torch elsewhere.

    Returns:
      A tensor like ``x``, rounded once. From Triton it is dense, its dims in memory in
      the order of those of ``x``.

    Raises:
      TypeError: An argument that is not a floating tensor; tables in half precision,
        or of two dtypes.
      ValueError: Shapes that do not fit; two devices; a ``kernel`` that is not there.
      RuntimeError: A gradient of ``cos`` or ``sin`` from the Triton kernel.

    Laws:
      ``kernel="triton"`` is ``kernel="reference"`` bit for bit: products and sums are
      not fused. Turning by an angle and by its negative is the transpose, so every
      derivative in ``x`` is there, the second too.

    Examples:
      >>> x = torch.tensor([[1.0, 0.0]])
      >>> rope(x, torch.zeros(1, 1), torch.ones(1, 1))  # by a right angle
      tensor([[0., 1.]])

    References:
      Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021, section 3.4.

    Differs from:
      The paper pairs neighbours ``(2i, 2i + 1)``; this is the layout of Llama's and
      GPT-NeoX's weights on Hugging Face.
    """
    check_floating("rope", x=x, cos=cos, sin=sin)
    for argument, table in (("cos", cos), ("sin", sin)):
        if table.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"rope: {argument} is {table.dtype}, expected torch.float32 or "
                f"torch.float64, the dtype of the arithmetic; use {argument}.float()"
            )
    if cos.dtype != sin.dtype:
        raise TypeError(
            f"rope: sin is {sin.dtype}, expected {cos.dtype} as cos; use "
            "sin.to(cos.dtype)"
        )
    _check_shapes(x.shape, cos.shape, sin.shape)
    if not runs_triton("rope", kernel, x, cos, sin):
        return rope_reference(x, cos, sin)
    return _Rope.apply(x, cos, sin, False)


def _check_shapes(x: Sequence[int], cos: Sequence[int], sin: Sequence[int]) -> None:
    if tuple(sin) != tuple(cos):
        raise ValueError(
            f"rope: sin has shape {tuple(sin)}, expected {tuple(cos)} as cos"
        )
    given = tuple(cos)
    if not x or not given or not 0 < 2 * given[-1] <= x[-1]:
        raise ValueError(
            f"rope: cos has shape {given} and x {tuple(x)}, expected cos [..., T, R] "
            "with 1 <= R <= K / 2 for x [..., T, K]"
        )
    fits = len(given) <= len(x) and all(
        have in (1, want)
        for have, want in zip(given[-2::-1], tuple(x)[-2::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"rope: cos has shape {given}, expected one that broadcasts to "
            f"{(*x[:-1], given[-1])}; cut the tables to the positions of x: cos[:T]"
        )


def _configuration(dtype: torch.dtype, half: int, rest: int) -> Configuration:
    tile = _Tile.of(half, rest)
    strides = [f"{name}_{i}" for name in ("x", "table", "out") for i in range(ROW_DIMS)]
    integers = ("rows", *(f"size_{i}" for i in range(1, ROW_DIMS)))
    return Configuration(
        f"rope/{pointer(dtype)[1:]}/{half}+{half}+{rest}",
        _kernel,
        {"x_ptr": pointer(dtype), "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
        | {"out_ptr": pointer(dtype)}
        | dict.fromkeys(integers, "i32")
        | dict.fromkeys(strides, "i64"),
        {
            "HALF": half,
            "REST": rest,
            "INVERSE": True,
            "WIDE": tl.float32,
            "INDEX": tl.int32,
            "ROWS": tile.rows,
            "COLS": tile.columns,
        },
        NUM_WARPS,
        fp_fusion=False,
        divisible=tuple(strides),
    )


CONFIGURATIONS: Final = tuple(
    _configuration(dtype, half, rest)
    for dtype in (torch.bfloat16, torch.float32)
    for half, rest in ((32, 0), (64, 0), (128, 0), (16, 32))
)
