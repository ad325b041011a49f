# SPDX-License-Identifier: Apache-2.0
"""Sums over lists of tensors in two launches: the second one, in a fixed order.

The first launch leaves numbers for every chunk of a ``multi_tensor.Table``; here they
are added up tensor by tensor, in float64, without atomics: the same bits every time.
"""

import functools
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configuration import Configuration, pointer
from .multi_tensor import Table, entry

SUM_BLOCK: Final = 1024  # partial sums at a time
NUM_WARPS: Final = 4


@functools.cache
def triton_type(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a dtype, as a constant of a kernel."""
    return tl.dtype(pointer(dtype)[1:])


class Partials(NamedTuple):
    """What the first launch leaves.

    Attributes:
      sums: Of every chunk, ``WIDTH`` numbers each.
      finite: 1 or 0 of every chunk, int32; or None.
      tables: The tables, with the first chunk of each among all.
    """

    sums: Tensor
    finite: Tensor | None
    tables: list[tuple[Table, int]]


@triton.jit
def sum_range(x_ptr, begin, end, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of ``x[begin * STRIDE : end * STRIDE : STRIDE]`` in float64."""
    at = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    while begin < end:
        inside = begin + at < end
        sums += tl.load(x_ptr + (begin + at) * STRIDE, inside, 0.0).to(tl.float64)
        begin += BLOCK
    return tl.sum(sums, 0)


@triton.jit
def all_range(flag_ptr, count, BLOCK: tl.constexpr):
    """1 if the first ``count`` flags are, else 0."""
    at = tl.arange(0, BLOCK)
    flags = tl.full([BLOCK], 1, tl.int32)
    begin = count * 0
    while begin < count:
        flags &= tl.load(flag_ptr + begin + at, begin + at < count, 1)
        begin += BLOCK
    return tl.min(flags, 0)


@triton.jit(do_not_specialize=["count", "chunks", "all_chunks"])
def segment_kernel(
    table_ptr,
    count,
    chunks,
    sums_ptr,
    out_ptr,
    finite_ptr,
    all_ptr,
    all_chunks,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i adds up the partial sums, WIDTH per chunk, of the table's tensor i.

    After the addresses, of COLUMNS columns, the table has the rows of the results. The
    first program also says whether all flags are 1, where there is ``all_ptr``.
    """
    tensor = tl.program_id(0)
    begin = tl.load(table_ptr + tensor)
    last = tensor + 1 == count
    end = tl.load(table_ptr + tensor + 1, tensor + 1 < count, 0)
    end = tl.where(last, chunks.to(tl.int64), end)
    row = entry(table_ptr, count, tensor, 2 + COLUMNS)
    for k in tl.static_range(WIDTH):
        total = sum_range(sums_ptr + k, begin, end, WIDTH, BLOCK)
        tl.store(out_ptr + row * WIDTH + k, total.to(out_ptr.dtype.element_ty))
    if all_ptr is not None and tensor == 0:
        tl.store(all_ptr, all_range(finite_ptr, all_chunks, BLOCK))


def reduce_segments(
    partials: Partials, out: Tensor, finite: Tensor | None, columns: int
) -> None:
    """Add up partial sums tensor by tensor; a table has its rows of ``out`` last.

    Args:
      partials: Of the first launch.
      out: [tensors, numbers] of zeros, of the dtype of the sums.
      finite: 0-d bool for all flags together, or None.
      columns: Columns of tensors in the tables.
    """
    width, left = out[0].numel(), len(partials.tables)
    for tab, at in partials.tables:
        left -= 1
        with torch.cuda.device_of(out):
            segment_kernel[(tab.count,)](
                tab.data,
                tab.count,
                tab.chunks,
                partials.sums[at * width :],
                out,
                partials.finite,
                finite if left == 0 else None,
                0 if partials.finite is None else partials.finite.numel(),
                COLUMNS=columns,
                WIDTH=width,
                BLOCK=SUM_BLOCK,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )


def _configuration(name: str, columns: int, width: int, last: bool) -> Configuration:
    pointers = {"sums_ptr": "*fp32", "out_ptr": "*fp32", "table_ptr": "*i64"}
    constants = {"COLUMNS": columns, "WIDTH": width, "BLOCK": SUM_BLOCK}
    if last:
        pointers |= {"finite_ptr": "*i32", "all_ptr": "*i1"}
    else:
        constants |= {"finite_ptr": None, "all_ptr": None}
    return Configuration(
        name,
        segment_kernel,
        pointers | dict.fromkeys(("count", "chunks", "all_chunks"), "i32"),
        constants,
        NUM_WARPS,
        narrow=21,
        streams=False,
    )


CONFIGURATIONS: Final = (
    _configuration("partial_sums/global_norm", 1, 1, True),
    _configuration("partial_sums/lamb", 6, 2, False),
)
